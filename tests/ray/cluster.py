"""A Ray cluster on this machine, each of whose nodes has an address of its own on the loopback interface."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import psutil

from tests.conftest import PLUGIN_PATH, free_port

HEAD_IP = "127.0.0.2"
START_TIMEOUT_S = 150
_OBJECT_STORE_BYTES = 100_000_000


class RayCluster:
    """Nodes that are started and killed one by one. ``environment`` is what lets others in.

    Args:
        lost_after_s: how long Ray waits for a head that has gone.
    """

    open_ones: ClassVar[list[RayCluster]] = []

    def __init__(self, lost_after_s: int) -> None:
        self.port = free_port()
        self.address = f"{HEAD_IP}:{self.port}"
        self.folder = Path(tempfile.mkdtemp(prefix="r-", dir="/tmp"))
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            # What takes a core's seconds and is needed by nobody here.
            "RAY_enable_worker_prestart": "0",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_enable_metrics_collection": "0",
            "RAY_raylet_start_wait_time_s": str(START_TIMEOUT_S),
            "RAY_gcs_rpc_server_reconnect_timeout_s": str(lost_after_s),
        }
        self._nodes: dict[str, list[psutil.Process]] = {}
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        self._log = (self.folder / "nodes.log").open("wb")
        self._starter = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("nodes.py"))],
            cwd=self.folder,
            env=inherited | self.environment | {"HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.open_ones.append(self)

    def start_head(self) -> None:
        """Start the node that all others need, on which no model runs."""
        self._start(
            HEAD_IP, 0, PLUGIN_PATH, gcs_server_port=self.port, temp_dir=str(self.folder), include_dashboard=False
        )

    def start_node(
        self, ip: str, n_cpus: int, *, resources: dict[str, float] | None = None, plugins: list[str] = PLUGIN_PATH
    ) -> None:
        """Start a node; ``plugins`` are the folders that its processes find modules in."""
        self._start(ip, n_cpus, plugins, gcs_address=self.address, resources=resources or {})

    def kill(self, *ips: str) -> None:
        """Kill nodes with all that runs on them, as when their machines fail."""
        for ip in ips:
            processes = self._nodes.pop(ip)
            with suppress(psutil.NoSuchProcess):
                processes = [*processes, *(child for one in processes for child in one.children(recursive=True))]
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    @property
    def ips(self) -> list[str]:
        """The addresses of its nodes."""
        return list(self._nodes)

    def processes(self) -> set[psutil.Process]:
        """Return all that runs on its nodes."""
        starter = psutil.Process(self._starter.pid)
        return {starter, *starter.children(recursive=True)}

    def close(self) -> None:
        assert self._starter.stdin is not None
        assert self._starter.stdout is not None
        self.open_ones.remove(self)
        processes = self.processes()
        self._starter.stdin.close()
        self._starter.wait(60)
        psutil.wait_procs(processes, 30)
        self._starter.stdout.close()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, ip: str, n_cpus: int, plugins: list[str], **parameters: Any) -> None:
        assert self._starter.stdin is not None
        assert self._starter.stdout is not None
        parameters |= {
            "node_ip_address": ip,
            "num_cpus": n_cpus,
            "num_gpus": 0,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_log_monitor": False,
            "no_monitor": True,
        }
        self._starter.stdin.write(json.dumps([parameters, {"PYTHONPATH": os.pathsep.join(plugins)}]) + "\n")
        self._starter.stdin.flush()
        told = self._starter.stdout.readline()
        assert told, (self.folder / "nodes.log").read_text(errors="replace")
        self._nodes[ip] = [psutil.Process(pid) for pid in json.loads(told)]
