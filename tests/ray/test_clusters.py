"""Other clusters than that of all tests: one of the server's own, and one that is not there."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.conftest import free_port
from tests.ray.cluster import HEAD_IP
from tests.ray.conftest import CONFIGURED, StartServer
from tests.ray.servers import FRAGILE, ask, start_model, status, stop_model


def folders() -> set[Path]:
    """Return those of clusters that servers start, and of such as Ray starts by itself."""
    temporary = Path(tempfile.gettempdir())
    return {*temporary.glob("fes-ray-*"), *temporary.glob("ray/session_*")}


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGTERM])
def test_without_an_address_a_cluster_is_started_that_ends_with_the_engine(
    gunicorn: StartServer, ended_by: signal.Signals
) -> None:
    before = folders()
    server = gunicorn(*CONFIGURED, **{f"FAKE_{name}_CONSUMER_TYPE": "ray_consumer" for name in ("ECHO", "FRAGILE")})
    start_model(server, "fake_echo")
    response = ask(server, FRAGILE)
    assert response.status_code == 200, response.text
    told = status(server, "fake_fragile")
    assert response.json() == [f"width 40 in process {told['pids'][0]}"]
    assert told["replicas"] == [{"node": None, "pid": told["pids"][0], "state": "running"}]
    stop_model(server, "fake_echo")
    assert ask(server, FRAGILE).json() == response.json()  # the cluster outlives the model that it was started for
    engine = psutil.Process(told["engine_pid"])
    cluster = engine.children(recursive=True)
    assert {"gcs_server", "raylet"} <= {process.name() for process in cluster}

    os.kill(engine.pid if ended_by == signal.SIGKILL else server.process.pid, ended_by)

    _, left = psutil.wait_procs(cluster, 60)
    assert left == []
    assert folders() <= before


def test_no_cluster_at_the_address_is_a_503_that_says_so(gunicorn: StartServer) -> None:
    address = f"{HEAD_IP}:{free_port()}"
    server = gunicorn(*CONFIGURED, FAKE_FRAGILE_CONSUMER_TYPE="ray_consumer", RAY_ADDRESS=address)

    response = ask(server, FRAGILE)

    assert (response.status_code, response.json()["code"]) == (503, "model_unavailable")
    assert f"no Ray cluster answers at {address}" in response.json()["error"]
    assert "Retry-After" in response.headers
