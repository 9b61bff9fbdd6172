"""Fixtures: a Ray cluster of a head and two nodes, and servers that use it, all of which the folder's tests share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from dev_server import ROOT
from tests.conftest import Server, gunicorn_command, is_gone, starting
from tests.ray.cluster import RayCluster
from tests.ray.servers import MODELS, SLOW_S, start_model

HAS_RAY = find_spec("ray") is not None
CONFIGURED = ("-c", str(ROOT / "gunicorn.conf.py"), "-w", "1")
NODES = ("127.0.0.3", "127.0.0.4")
#: The node that has no plugins of its own.
BARE_IP = "127.0.0.5"
#: How long Ray waits for a head that has gone.
LOST_AFTER_S = 4

StartServer = Callable[..., Server]
ServeUntil = Callable[..., AbstractContextManager[Server]]
lasting: list[psutil.Process] = []  # servers that outlive a test


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.process)
            item.add_marker(pytest.mark.skipif(not HAS_RAY, reason="ray[serve] is not installed"))


@pytest.fixture(scope="package")
def cluster() -> Iterator[RayCluster]:
    made = RayCluster(LOST_AFTER_S)
    try:
        made.start_head()
        for ip in NODES:
            made.start_node(ip, n_cpus=2)
        yield made
    finally:
        made.close()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a process, but those of the cluster and of the servers that outlive it."""
    before = set(psutil.Process().children(recursive=True))
    yield
    deadline = time.monotonic() + 45
    while time.monotonic() < deadline:
        theirs = {process for one in RayCluster.open_ones for process in one.processes()}
        theirs |= {process for server in lasting for process in [server, *server.children(recursive=True)]}
        found = set(psutil.Process().children(recursive=True)) - before - theirs
        children = [child for child in found if not is_gone(child)]
        if not children:
            return
        time.sleep(0.05)
    pytest.fail(f"left behind: {children}")


@pytest.fixture(scope="package")
def serving(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> ServeUntil:
    """``with serving(SETTING=value, ...) as server`` has a server whose fakes run on the cluster."""

    @contextmanager
    def serve(**settings: str) -> Iterator[Server]:
        general = {f"{model.upper()}_CONSUMER_TYPE": "ray_consumer" for model in MODELS}
        general |= {"RAY_ADDRESS": cluster.address, "STOP_GRACE_PERIOD": "3", "LOAD_RETRY_DELAY": "0.5"}
        general |= {f"RAY_{which}_REPLICAS_FAKE_FRAGILE": "2" for which in ("MIN", "MAX")}
        general |= {"RAY_RESOURCES_FAKE_ECHO": '{"bare": 1}', "FAKE_SECONDS": str(SLOW_S)}
        with starting(tmp_path_factory.mktemp("server"), gunicorn_command) as start:
            server = start(*CONFIGURED, **cluster.environment, **general | settings)
            process = psutil.Process(server.process.pid)
            lasting.append(process)
            try:
                yield server
            finally:
                lasting.remove(process)

    return serve


@pytest.fixture(scope="package")
def first(serving: ServeUntil) -> Iterator[Server]:
    """The server that starts the models which others find. ``fake_fragile`` has two replicas."""
    with serving() as server:
        yield server


@pytest.fixture(scope="package")
def second(serving: ServeUntil, first: Server) -> Iterator[Server]:
    """A server that has other settings for ``fake_slow``, and asks more for ``fake_flaky`` than there is."""
    settings = {"RAY_NUM_CPUS_FAKE_SLOW": "0.5", "FAKE_SECONDS": "0.01", "REQUEST_TIMEOUT": "5"}
    settings |= {"RAY_NUM_GPUS_FAKE_FLAKY": "1", "RAY_RESOURCES_FAKE_FLAKY": '{"big": 2}'}
    start_model(first, "fake_fragile")
    with serving(**settings, LOAD_RETRY_DELAY="1000") as server:
        server.post("/api/models/fake_flaky/start", {})  # that there is no room for it shows only after a while
        start_model(server, "fake_fragile")
        yield server
