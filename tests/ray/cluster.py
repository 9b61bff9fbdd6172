"""A Ray cluster on this machine, each of whose nodes has an address of its own on the loopback interface."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

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

    def __init__(self, lost_after_s: int = 60) -> None:
        self.open_ones.append(self)
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
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def start_head(self, n_cpus: int = 0) -> None:
        options = "--head", "--include-dashboard=false", f"--port={self.port}", f"--temp-dir={self.folder}"
        self._start(HEAD_IP, n_cpus, *options)

    def start_node(
        self, ip: str, n_cpus: int, *options: str, plugins: list[str] | None = None, **variables: str
    ) -> None:
        """Start a node and wait until it runs; ``plugins`` are the folders that its processes find modules in."""
        self._start(ip, n_cpus, f"--address={self.address}", *options, plugins=plugins, **variables)

    def kill(self, ip: str) -> None:
        """Kill a node with all that runs on it, as when its machine fails."""
        node = self._nodes.pop(ip)
        with suppress(psutil.NoSuchProcess):
            processes = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes[1:], 10)
        node.wait()

    def processes(self) -> set[psutil.Process]:
        """Return all that runs on its nodes."""
        found: set[psutil.Process] = set()
        for node in self._nodes.values():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(node.pid)
                found |= {process, *process.children(recursive=True)}
        return found

    def close(self) -> None:
        self.open_ones.remove(self)
        for ip in reversed(list(self._nodes)):
            self.kill(ip)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, ip: str, n_cpus: int, *options: str, plugins: list[str] | None = None, **variables: str) -> None:
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        path = {"PYTHONPATH": os.pathsep.join(PLUGIN_PATH if plugins is None else plugins), "HF_HUB_OFFLINE": "1"}
        command = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            f"--node-ip-address={ip}",
            f"--num-cpus={n_cpus}",
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            "--include-log-monitor=false",
            "--disable-usage-stats",
            "--block",
            *options,
        ]
        path_of_log = self.folder / f"{ip}.log"
        with path_of_log.open("wb") as log:
            self._nodes[ip] = subprocess.Popen(
                command,
                cwd=self.folder,
                env=inherited | path | self.environment | variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Ray runtime started" not in (told := path_of_log.read_text(errors="replace")):
            assert time.monotonic() < deadline, told
            assert self._nodes[ip].poll() is None, told
            time.sleep(0.05)
