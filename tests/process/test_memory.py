"""What the processes of a real server hold in memory."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import pytest

from tests.conftest import Server
from tests.waiting import wait_until

pytestmark = pytest.mark.process

MIB = 1 << 20
CAPTION = "/api/tasks/image_captioning/models/fake_big/features"
STATUS = "/api/models/fake_big/status"


def wait_for_state(server: Server, state: str) -> None:
    wait_until(lambda: server.get(STATUS).json()["state"] == state, state)


def test_stopping_a_model_of_1_gib_gives_its_memory_back_and_it_starts_again(
    gunicorn: Callable[..., Server], picture: str
) -> None:
    server = gunicorn("--preload")
    engine = psutil.Process(server.get(STATUS).json()["engine_pid"])
    stopped = engine.memory_info().rss

    for _ in range(2):
        assert server.post(CAPTION, {"image": picture}).json() == ["1024 MiB"]
        assert engine.memory_info().rss - stopped > 1024 * MIB

        server.post("/api/models/fake_big/stop", {})
        wait_for_state(server, "stopped")
        assert engine.memory_info().rss - stopped < 64 * MIB


def test_a_server_without_a_loaded_model_is_small(gunicorn: Callable[..., Server]) -> None:
    server = gunicorn("--preload", "-w", "1")
    master = psutil.Process(server.process.pid)

    held = sum(process.memory_info().rss for process in [master, *master.children()])

    assert held < 120 * MIB
