"""What the processes of a real server hold in memory."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from PIL import Image

from feature_extraction_server.core import pixels
from feature_extraction_server.core.cores import N_CORES
from tests.conftest import Server, encode_image, worker_configuration
from tests.waiting import wait_until

pytestmark = pytest.mark.process

MIB = 1 << 20
CAPTION = "/api/tasks/image_captioning/models/fake_big/features"
SLOW = "/api/models/fake_slow/tasks/image_captioning/features"
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


def test_pictures_that_wait_are_not_decoded_but_for_the_next_calls(gunicorn: Callable[..., Server]) -> None:
    server = gunicorn("-w", "1", "--threads", "64", FAKE_SECONDS="0.2", MAX_BATCH_SIZE="1")
    picture = Image.new("RGB", (3000, 2000))
    body = {"image": encode_image(picture, "JPEG")}
    server.post(SLOW, body).raise_for_status()
    master = psutil.Process(server.process.pid)
    processes = [master, *master.children(recursive=True)]
    n = 20 * N_CORES
    peak = 0

    with ThreadPoolExecutor(n) as pool:
        answers = [pool.submit(server.post, SLOW, body) for _ in range(n)]
        while not all(answer.done() for answer in answers):
            peak = max(peak, sum(process.memory_info().rss for process in processes))
            time.sleep(0.05)

    assert {answer.result().status_code for answer in answers} == {200}
    # Decoded, each would be in the web worker and in the engine: twice as much, and the processes themselves.
    assert peak < 1.5 * n * pixels.n_bytes(picture.size)


def test_what_is_kept_for_pictures_is_given_back_when_there_are_none(
    gunicorn: Callable[..., Server], tmp_path: Path
) -> None:
    configuration = worker_configuration(tmp_path, GIVE_BACK_AFTER_S=1)
    server = gunicorn("-c", configuration, "-w", "1", FAKE_SECONDS="0")
    body = {"image": encode_image(Image.new("RGB", (4000, 3000)), "JPEG")}
    server.post(SLOW, {"image": encode_image(Image.new("RGB", (40, 30)))}).raise_for_status()
    processes = psutil.Process(server.process.pid).children(recursive=True)

    def held() -> int:
        return sum(process.memory_info().rss for process in processes)

    before = held()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: server.post(SLOW, body), range(16)))

    assert {answer.status_code for answer in answers} == {200}
    assert held() > before + 80 * MIB
    wait_until(lambda: held() < before + 40 * MIB)
    assert server.post(SLOW, body).ok


def test_requests_that_failed_keep_no_pictures(gunicorn: Callable[..., Server]) -> None:
    server = gunicorn("-w", "1", FAKE_SECONDS="0")
    broken = {"image": encode_image(Image.new("RGB", (1, 9)))}

    statuses = {server.post(SLOW, broken).status_code for _ in range(40)}

    (worker,) = [child for child in psutil.Process(server.process.pid).children() if "gunicorn" in child.cmdline()]
    files = [os.readlink(path) for path in Path(f"/proc/{worker.pid}/fd").iterdir()]
    assert statuses == {500}
    assert sum("pixels" in file for file in files) <= 16  # two for each picture that waits to be forgotten


def test_a_picture_is_refused_undecoded_where_the_queue_is_full(gunicorn: Callable[..., Server], picture: str) -> None:
    server = gunicorn("--threads", "8", FAKE_SECONDS="5", MAX_QUEUE_SIZE="1", MAX_BATCH_SIZE="1")
    no_picture = base64.b64encode(b"no picture").decode()

    def has(running: int, waiting: int) -> bool:
        status = server.get("/api/models/fake_slow/status").json()
        return (status["running_jobs"], status["queue_depth"]) == (running, waiting)

    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(server.post, SLOW, {"image": picture})
        wait_until(lambda: has(running=1, waiting=0))
        waiting = pool.submit(server.post, SLOW, {"image": picture})
        wait_until(lambda: has(running=1, waiting=1))

        refused = server.post(SLOW, {"image": no_picture})

    assert refused.json()["code"] == "queue_full"
    assert (running.result().status_code, waiting.result().status_code) == (200, 200)
    assert server.post(SLOW, {"image": no_picture}).json()["code"] == "invalid_input"
