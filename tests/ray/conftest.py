"""Fixtures: a Ray cluster of a head and two nodes, which a module's tests share, and servers that use it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from dev_server import ROOT
from tests.conftest import Server
from tests.ray.cluster import RayCluster

HAS_RAY = find_spec("ray") is not None
CONFIGURED = ("-c", str(ROOT / "gunicorn.conf.py"), "-w", "1")
NODES = ("127.0.0.3", "127.0.0.4")
MODELS = ("fake_echo", "fake_slow", "fake_fragile", "fake_broken")

StartServer = Callable[..., Server]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.process)
            item.add_marker(pytest.mark.skipif(not HAS_RAY, reason="ray[serve] is not installed"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    made = RayCluster()
    try:
        made.start_head()
        for ip in NODES:
            made.start_node(ip, n_cpus=2)
        yield made
    finally:
        made.close()


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a process, but those of the clusters that outlive it."""
    before = set(psutil.Process().children(recursive=True))
    yield
    clusters = list(RayCluster.open_ones)
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        theirs = {process for one in clusters for process in one.processes()}
        found = set(psutil.Process().children(recursive=True)) - before - theirs
        children = [child for child in found if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        if not children:
            return
        time.sleep(0.05)
    pytest.fail(f"left behind: {children}")


@pytest.fixture
def serve(gunicorn: StartServer, cluster: RayCluster) -> StartServer:
    """``serve(SETTING=value, ...)`` starts a server whose fakes run on the cluster."""
    return server_of(gunicorn, cluster)


def server_of(gunicorn: StartServer, cluster: RayCluster) -> StartServer:
    def start(**settings: str) -> Server:
        consumers = {f"{model.upper()}_CONSUMER_TYPE": "ray_consumer" for model in MODELS}
        general = {"RAY_ADDRESS": cluster.address, "STOP_GRACE_PERIOD": "5", "LOAD_RETRY_DELAY": "0.5"}
        return gunicorn(*CONFIGURED, **cluster.environment, **consumers | general | settings)

    return start


def status(server: Server, model: str) -> dict[str, Any]:
    answer: dict[str, Any] = server.get(f"/api/models/{model}/status").json()
    return answer
