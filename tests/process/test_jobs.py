"""Stored jobs under real gunicorns: the same from any worker, and not lost by any process's death."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
from PIL import Image

from dev_server import ROOT
from feature_extraction_server.core.engine_client import private_directory
from tests.conftest import Server, encode_image, is_gone
from tests.process.test_engine_process import engine_of
from tests.waiting import wait_until

pytestmark = pytest.mark.process

SLOW = "/api/tasks/image_captioning/models/fake_slow/jobs"
FRAGILE = "/api/tasks/image_captioning/models/fake_fragile/jobs"
THREADS = ("--worker-class", "gthread", "--threads", "16")
Gunicorn = Callable[..., Server]


def picture_of(width: int) -> str:
    return encode_image(Image.new("RGB", (width, 3)))


def submit(server: Server, path: str, width: int) -> str:
    response = server.post(path, {"image": picture_of(width)})
    assert response.status_code == 202, response.text
    return response.headers["Location"]


def job(server: Server, location: str) -> Any:
    return server.get(location + "?wait=60").json()


def states(path: Path) -> list[str]:
    """Return the states of the jobs in a file, without asking a server."""
    with closing(sqlite3.connect(path)) as database:
        return [state for (state,) in database.execute("SELECT state FROM jobs ORDER BY seq")]


def crashes(path: Path) -> list[int]:
    with closing(sqlite3.connect(path)) as database:
        return [n for (n,) in database.execute("SELECT crashes FROM jobs ORDER BY seq")]


def kill_everything(server: Server) -> None:
    master = psutil.Process(server.process.pid)
    processes = [master, *master.children(recursive=True)]
    for process in processes:
        process.kill()
    server.process.wait()
    wait_until(lambda: all(is_gone(process) for process in processes), "the end of all processes")


@pytest.mark.parametrize("preload", [("--preload",), ()], ids=["preload", "no preload"])
def test_accepted_jobs_survive_kill_9_of_everything_and_run_unasked(
    gunicorn: Gunicorn, tmp_path: Path, preload: tuple[str, ...]
) -> None:
    path = tmp_path / "jobs.sqlite3"
    settings = {"JOBS_PATH": str(path), "MAX_BATCH_SIZE": "1"}
    first = gunicorn("-w", "2", *THREADS, *preload, **settings, FAKE_SECONDS="30")
    locations = [submit(first, SLOW, width) for width in range(2, 9)]
    wait_until(lambda: "running" in states(path))

    kill_everything(first)
    assert "succeeded" not in states(path)
    second = gunicorn("-w", "2", *THREADS, *preload, **settings, FAKE_SECONDS="0.01")

    wait_until(lambda: states(path) == ["succeeded"] * 7, "the jobs' end")
    results = [job(second, location)["result"][0] for location in locations]
    assert [result.partition(" ")[0] for result in results] == [str(width) for width in range(2, 9)]


def test_a_job_is_the_same_from_any_worker(gunicorn: Gunicorn) -> None:
    server = gunicorn("-w", "3", "--preload")  # sync workers: each new connection may meet another one
    locations = [submit(server, SLOW, width) for width in range(2, 8)]

    jobs = [job(server, location) for location in locations for _ in range(3)]

    assert {found["state"] for found in jobs} == {"succeeded"}
    assert {len(server.get("/api/jobs").json()) for _ in range(6)} == {6}


def test_a_killed_worker_s_jobs_are_run_by_the_others(gunicorn: Gunicorn, tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite3"
    server = gunicorn("-w", "2", *THREADS, "--preload", JOBS_PATH=str(path), FAKE_SECONDS="1")
    locations = [submit(server, SLOW, width) for width in (2, 3)]
    wait_until(lambda: states(path) == ["running"] * 2)

    for worker in server.workers():
        worker.kill()

    assert [job(server, location)["state"] for location in locations] == ["succeeded"] * 2
    assert crashes(path) == [1, 1]


def test_a_job_whose_engine_is_killed_is_run_by_the_next_engine(gunicorn: Gunicorn, tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite3"
    server = gunicorn(*THREADS, "--preload", JOBS_PATH=str(path), FAKE_SECONDS="1")
    location = submit(server, SLOW, 2)
    wait_until(lambda: server.get("/api/models/fake_slow/status").json()["running_jobs"] == 1)

    engine_of(server).kill()

    assert job(server, location)["state"] == "succeeded"
    assert crashes(path) == [1]


def test_a_job_that_kills_its_model_fails_and_the_others_do_not(gunicorn: Gunicorn) -> None:
    server = gunicorn(*THREADS, "--preload")

    bad, *good = [submit(server, FRAGILE, width) for width in (2, 7, 8, 9)]

    assert [job(server, location)["state"] for location in good] == ["succeeded"] * 3
    failed = job(server, bad)
    assert (failed["state"], failed["error"]["code"]) == ("failed", "model_unavailable")


def test_jobs_that_a_server_does_not_finish_before_its_end_are_queued_again(gunicorn: Gunicorn, tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite3"
    server = gunicorn(*THREADS, "--preload", JOBS_PATH=str(path), FAKE_SECONDS="3", STOP_GRACE_PERIOD="0")
    submit(server, SLOW, 2)
    wait_until(lambda: states(path) == ["running"])

    assert server.stop() == 0

    assert (states(path), crashes(path)) == (["queued"], [0])


def test_a_server_that_is_told_to_end_queues_its_jobs_at_once_and_keeps_nobody_who_waits_for_one(
    gunicorn: Gunicorn, tmp_path: Path
) -> None:
    path = tmp_path / "jobs.sqlite3"
    options = ("-c", str(ROOT / "gunicorn.conf.py"))
    server = gunicorn(*options, JOBS_PATH=str(path), FAKE_SECONDS="60", STOP_GRACE_PERIOD="0.1")
    locations = [submit(server, SLOW, width) for width in range(1, 4)]
    wait_until(lambda: states(path) == ["running"] * 3)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(job, server, locations[0])
        (worker,) = server.workers()
        wait_until(lambda: any(one.status == "ESTABLISHED" for one in worker.net_connections()), "the client")
        assert server.get("/health/live").ok  # so the one before has been read, too

        server.process.terminate()

        assert waiting.result(20)["state"] == "queued"
        assert server.process.wait(20) == 0
    assert states(path) == ["queued"] * 3
    assert crashes(path) == [0] * 3


def test_jobs_wait_for_the_next_start_when_only_the_main_process_is_killed(gunicorn: Gunicorn, tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite3"
    settings = {"JOBS_PATH": str(path), "STOP_GRACE_PERIOD": "0"}
    server = gunicorn("-w", "2", *THREADS, "--preload", **settings, FAKE_SECONDS="30")
    for width in (2, 3, 4):
        submit(server, SLOW, width)
    wait_until(lambda: states(path) == ["running"] * 3)
    master = psutil.Process(server.process.pid)
    others = master.children(recursive=True)

    master.kill()
    server.process.wait()

    wait_until(lambda: all(is_gone(process) for process in others), "the end of the others")
    assert set(states(path)) <= {"queued", "running"}
    assert crashes(path) == [0] * 3
    gunicorn(*THREADS, **settings, FAKE_SECONDS="0.01")
    wait_until(lambda: states(path) == ["succeeded"] * 3)


def test_jobs_without_a_path_end_with_the_server_and_leave_no_file(gunicorn: Gunicorn) -> None:
    server = gunicorn(*THREADS, "--preload")
    submit(server, SLOW, 2)
    directory = private_directory(server.process.pid)
    assert (directory / "jobs.sqlite3").exists()

    assert server.stop() == 0

    assert not directory.exists()
    assert list(Path(tempfile.gettempdir()).glob(f"{directory.name}*")) == []


def test_vitrivr_s_paths_with_two_slashes_and_bodies_of_many_megabytes_pass(gunicorn: Gunicorn) -> None:
    server = gunicorn(*THREADS, "--preload", VITRIVR_FEATURES="clip_image=image_captioning:fake_echo")
    noise = np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), dtype=np.uint8)
    url = "data:image/png;base64," + encode_image(Image.fromarray(noise), compress_level=0)

    responses = [
        requests.post(f"{server.url}{path}/clip_image", {"data": url}, timeout=60) for path in ("/extract", "//extract")
    ]

    assert [response.status_code for response in responses] == [200, 200]
    assert all(response.json()["text"].startswith("1400x1400") for response in responses)
