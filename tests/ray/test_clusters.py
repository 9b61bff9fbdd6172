"""Other clusters than that of all tests: one of the server's own, and one that is not there."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import psutil

from tests.conftest import free_port
from tests.ray.cluster import HEAD_IP
from tests.ray.conftest import CONFIGURED, StartServer
from tests.ray.servers import FRAGILE, ask, status


def folders() -> set[Path]:
    """Return those of clusters that servers start, and of such as Ray starts by itself."""
    temporary = Path(tempfile.gettempdir())
    return {*temporary.glob("fes-ray-*"), *temporary.glob("ray/session_*")}


def test_without_an_address_a_cluster_is_started_that_ends_with_a_killed_engine(gunicorn: StartServer) -> None:
    before = folders()
    server = gunicorn(*CONFIGURED, FAKE_FRAGILE_CONSUMER_TYPE="ray_consumer")
    response = ask(server, FRAGILE)
    assert response.status_code == 200, response.text
    told = status(server, "fake_fragile")
    assert response.json() == [f"width 40 in process {told['pids'][0]}"]
    assert told["replicas"] == [{"node": None, "pid": told["pids"][0], "state": "running"}]
    engine = psutil.Process(told["engine_pid"])
    cluster = engine.children(recursive=True)
    assert {"gcs_server", "raylet"} <= {process.name() for process in cluster}

    os.kill(engine.pid, signal.SIGKILL)

    _, left = psutil.wait_procs(cluster, 20)
    assert left == []
    assert folders() <= before


def test_no_cluster_at_the_address_is_a_503_that_says_so(gunicorn: StartServer) -> None:
    address = f"{HEAD_IP}:{free_port()}"
    server = gunicorn(*CONFIGURED, FAKE_FRAGILE_CONSUMER_TYPE="ray_consumer", RAY_ADDRESS=address)

    response = ask(server, FRAGILE)

    assert (response.status_code, response.json()["code"]) == (503, "model_load_failed")
    assert f"no Ray cluster answers at {address}" in response.json()["error"]
    assert "Retry-After" in response.headers
