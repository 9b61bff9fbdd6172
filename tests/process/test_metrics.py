"""Metrics, health and request ids of a real gunicorn with several workers."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from feature_extraction_server.core.engine_client import private_directory
from tests.conftest import Server
from tests.waiting import at_once, wait_until

pytestmark = pytest.mark.process

StartServer = Callable[..., Server]

ECHO = "/api/tasks/fake_shout/models/fake_echo/features"
SLOW = "/api/tasks/image_captioning/models/fake_slow/features"
THREADS = ("--worker-class", "gthread", "--threads", "16")
TWO = ("-w", "2", *THREADS)


def total(server: Server, name: str, **labels: str) -> float:
    """Return the sum of the samples of a metric that have some labels."""
    families = text_string_to_metric_families(server.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def echo(server: Server, n: int = 1) -> None:
    answers = at_once(n, lambda _: server.post(ECHO, {"text": "hi"}))
    assert {answer.status_code for answer in answers} == {200}


@pytest.mark.parametrize("preload", [("--preload",), ()], ids=["preload", "each worker by itself"])
def test_counts_of_all_workers_are_added_up(gunicorn: StartServer, preload: tuple[str, ...]) -> None:
    server = gunicorn(*TWO, *preload)

    for _ in range(3):
        echo(server, 10)

    assert len(list((private_directory(server.process.pid) / "metrics").glob("counter_*.db"))) == 2
    assert [total(server, "fes_requests_total", model="fake_echo", status="200") for _ in range(4)] == [30] * 4
    assert total(server, "fes_model_requests_total", model="fake_echo") == 30
    assert total(server, "fes_batch_items_sum", model="fake_echo") == 30


def test_counts_survive_a_killed_worker(gunicorn: StartServer) -> None:
    server = gunicorn(*TWO, "--preload")
    echo(server, 20)
    before = server.workers()

    for worker in before:
        worker.kill()
    wait_until(lambda: len(server.workers() - before) == 2)

    def answered() -> bool:
        try:
            return server.get("/health/live").ok
        except requests.ConnectionError:
            return False

    wait_until(answered, "the next workers")
    echo(server, 5)
    assert total(server, "fes_requests_total", model="fake_echo", status="200") == 25


def test_counts_survive_workers_that_are_replaced_after_some_requests(gunicorn: StartServer) -> None:
    server = gunicorn("-w", "1", *THREADS, "--preload", "--max-requests", "5")
    n = 0

    def has_twelve() -> bool:
        nonlocal n
        with suppress(requests.ConnectionError):  # it met the worker that leaves
            n += server.post(ECHO, {"text": "hi"}).ok
        return n >= 12

    wait_until(has_twelve, "twelve answers")
    # A worker counts on in the file of one that has ended. Two may be there at once.
    assert len(list((private_directory(server.process.pid) / "metrics").glob("*.db"))) <= 2
    assert total(server, "fes_requests_total", model="fake_echo", status="200") == n


def test_requests_are_answered_though_they_cannot_be_counted(gunicorn: StartServer) -> None:
    server = gunicorn("-w", "1", *THREADS, "--preload")
    echo(server)
    (before,) = server.workers()

    shutil.rmtree(private_directory(server.process.pid) / "metrics")
    before.kill()
    wait_until(lambda: bool(server.workers() - {before}), "the next worker")

    def answered() -> bool:
        try:
            return server.get("/health/live").status_code == 200
        except requests.ConnectionError:
            return False

    wait_until(answered, "the next worker's answer")
    echo(server, 3)
    assert server.get("/metrics").status_code == 200


def test_metrics_start_no_engine(gunicorn: StartServer) -> None:
    server = gunicorn(*TWO, "--preload")

    assert total(server, "fes_engine_up") == 0
    assert total(server, "fes_queue_depth", model="fake_echo") == 0
    assert total(server, "fes_model_state", model="fake_echo", state="stopped") == 1
    assert not [
        child
        for child in psutil.Process(server.process.pid).children(recursive=True)
        if "engine" in str(child.cmdline())
    ]


def test_server_is_ready_when_the_models_to_preload_run(gunicorn: StartServer) -> None:
    server = gunicorn(*TWO, "--preload", PRELOAD_MODELS="fake_slow", FAKE_LOAD_SECONDS="3")
    told: list[tuple[int, Any]] = []

    def is_ready() -> bool:
        answer = server.get("/health/ready")
        told.append((answer.status_code, answer.json()))
        return answer.ok

    wait_until(is_ready, "the model")

    assert (503, {"status": "not ready", "reason": "the model fake_slow is loading"}) in told
    assert told[-1] == (200, {"status": "ready"})


def test_health_and_metrics_are_told_while_the_engine_is_stopped(gunicorn: StartServer) -> None:
    server = gunicorn(*TWO, "--preload", PRELOAD_MODELS="fake_echo")
    wait_until(lambda: server.get("/health/ready").ok, "the model")
    (engine,) = (
        child
        for child in psutil.Process(server.process.pid).children(recursive=True)
        if "engine_process" in " ".join(child.cmdline())
    )

    engine.suspend()
    try:
        began = time.monotonic()
        live, ready = server.get("/health/live"), server.get("/health/ready")
        took_s = time.monotonic() - began
        up = total(server, "fes_engine_up")
    finally:
        engine.resume()

    assert live.ok
    assert ready.status_code in (200, 503)  # 200 where this worker has asked before
    assert took_s < 5  # it would take REQUEST_TIMEOUT, 600 s, to wait for the engine
    assert up == 0
    assert total(server, "fes_engine_up") == 1


def test_lines_of_the_engine_have_the_request_s_id(gunicorn: StartServer, tmp_path: Path, picture: str) -> None:
    server = gunicorn(*TWO, "--preload")

    answer = requests.post(
        server.url + ECHO, json={"text": "crash"}, headers={"X-Request-ID": "who-crashed"}, timeout=60
    )

    assert (answer.status_code, answer.headers["X-Request-ID"]) == (500, "who-crashed")
    assert "Server-Timing" in answer.headers
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert "[who-crashed]" in next(line for line in lines if "failed on the task" in line)
    assert "[who-crashed]" in next(line for line in lines if "fake_echo is starting" in line)


def test_lines_of_a_model_in_a_process_of_its_own_have_the_request_s_id(gunicorn: StartServer, tmp_path: Path) -> None:
    server = gunicorn(*TWO, "--preload", FAKE_ECHO_CONSUMER_TYPE="process_consumer")

    requests.post(server.url + ECHO, json={"text": "crash"}, headers={"X-Request-ID": "who-crashed"}, timeout=60)

    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert "[who-crashed]" in next(line for line in lines if "failed in fake_shout" in line)


def test_times_come_from_the_engine(gunicorn: StartServer, picture: str) -> None:
    server = gunicorn(*TWO, "--preload", FAKE_SECONDS="0.2", FAKE_LOAD_SECONDS="1")

    answer = server.post(SLOW, {"image": picture})

    queued, computed = (float(part.partition("dur=")[2]) for part in answer.headers["Server-Timing"].split(", "))
    assert queued >= 500  # most of the second that loading takes, in which it waits
    assert computed >= 200
