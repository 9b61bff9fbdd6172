"""Clusters that come and go: one of the server's own, one whose head dies, and one that is not there."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import psutil

from tests.conftest import Server, free_port
from tests.ray.cluster import HEAD_IP, RayCluster
from tests.ray.conftest import CONFIGURED, StartServer, server_of, status
from tests.ray.test_ray_consumer import FRAGILE, ask, pids
from tests.waiting import wait_until

NODE_IP = "127.0.0.9"


def test_without_an_address_a_cluster_is_started_that_ends_with_a_killed_engine(gunicorn: StartServer) -> None:
    before = set(Path(tempfile.gettempdir()).glob("fes-ray-*"))
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
    assert set(Path(tempfile.gettempdir()).glob("fes-ray-*")) <= before


def test_no_cluster_at_the_address_is_a_503_that_says_so(gunicorn: StartServer) -> None:
    address = f"{HEAD_IP}:{free_port()}"
    server = gunicorn(*CONFIGURED, FAKE_FRAGILE_CONSUMER_TYPE="ray_consumer", RAY_ADDRESS=address)

    response = ask(server, FRAGILE)

    assert (response.status_code, response.json()["code"]) == (503, "model_load_failed")
    assert f"no Ray cluster answers at {address}" in response.json()["error"]
    assert "Retry-After" in response.headers


def test_a_lost_head_is_a_503_until_it_is_back_and_the_server_goes_on(gunicorn: StartServer) -> None:
    cluster = RayCluster(lost_after_s=3)
    try:
        cluster.start_head()
        cluster.start_node(NODE_IP, 1)
        server: Server = server_of(gunicorn, cluster)()
        assert ask(server, FRAGILE).status_code == 200
        before = pids(server, "fake_fragile")

        cluster.kill(HEAD_IP)

        wait_until(lambda: ask(server, FRAGILE).status_code == 503, "a 503")
        response = ask(server, FRAGILE)
        assert response.json()["code"] in ("model_unavailable", "model_load_failed")
        assert "Retry-After" in response.headers

        cluster.kill(NODE_IP)
        cluster.start_head()
        cluster.start_node(NODE_IP, 1)
        wait_until(lambda: ask(server, FRAGILE).status_code == 200, "an answer")
        assert pids(server, "fake_fragile").isdisjoint(before)
    finally:
        cluster.close()
