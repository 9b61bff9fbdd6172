"""The jobs API over an engine in this process: what is told at once, what a job tells, and how it ends."""

from __future__ import annotations

import importlib
import io
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from PIL import Image
from werkzeug.test import TestResponse

from feature_extraction_server.core.application import ApplicationInterface
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.errors import ModelUnavailable
from feature_extraction_server.core.job_runner import JobRunner
from feature_extraction_server.core.job_store import JobStore
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.setup import build_engine
from feature_extraction_server.core.turns import Turns
from feature_extraction_server.flask.app import create_app
from tests.conftest import encode_image
from tests.http.conftest import MakeClient, json_of
from tests.waiting import TIMEOUT_S, wait_until

ECHO = "/api/tasks/image_captioning/models/fake_echo/jobs"
GATED = "/api/tasks/image_captioning/models/gated/jobs"
VERSIONED = "/api/tasks/image_captioning/models/versioned/jobs"
UNLUCKY = "/api/tasks/image_captioning/models/unlucky/jobs"
WAIT = "?wait=60"

# A model whose calls end when the test lets them.
GATED_SOURCE = """
import threading

calls = []
passes = threading.Semaphore(0)

def load_model():
    pass

def image_captioning(image, config):
    calls.append([picture.width for picture in image])
    assert passes.acquire(timeout=120)
    return [[f"{picture.width} wide"] for picture in image]
"""
# A model that is lost in its first UNLUCKY_CALLS calls, as one is whose process dies.
UNLUCKY_SOURCE = """
from feature_extraction_server.core.errors import ModelUnavailable

calls = 0

def add_settings(settings):
    global losses
    losses = settings.add_setting(name="UNLUCKY_CALLS", type=int, default=1, description="Calls that lose the model")

def load_model():
    pass

def image_captioning(image, config):
    global calls
    calls += 1
    if calls <= losses.get():
        raise ModelUnavailable("the engine died")
    return [[f"call {calls}"] for _ in image]
"""

# A model whose revision is told by VERSIONED_REVISION when it is loaded, and whose calls end when the test lets them.
VERSIONED_SOURCE = """
import os
import threading

calls = []
passes = threading.Semaphore(0)

def load_model():
    global revision
    revision = os.environ["VERSIONED_REVISION"]

def provenance():
    return {"checkpoint": "mine", "revision": revision}

def image_captioning(image, config):
    calls.append([picture.width for picture in image])
    assert passes.acquire(timeout=120)
    return [[f"{picture.width} of {revision}"] for picture in image]
"""


@pytest.fixture
def gated(plugin: Callable[[str, str, str], None]) -> Iterator[Any]:
    """The module of a model ``gated``: ``gated.passes.release()`` lets one call end; ``gated.calls`` has the widths."""
    plugin("models", "gated", GATED_SOURCE)
    module = importlib.import_module("feature_extraction_server.models.gated")
    yield module
    module.passes.release(1000)


@pytest.fixture
def versioned(plugin: Callable[[str, str, str], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of a model ``versioned``, like ``gated``, whose first revision is ``one``."""
    plugin("models", "versioned", VERSIONED_SOURCE)
    monkeypatch.setenv("VERSIONED_REVISION", "one")
    module = importlib.import_module("feature_extraction_server.models.versioned")
    yield module
    module.passes.release(1000)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


@pytest.fixture
def no_crash_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_extraction_server.core.job_store.CRASH_DELAY_S", 0)
    monkeypatch.setattr("feature_extraction_server.core.job_runner.RECOVERY_INTERVAL_S", 0.01)
    monkeypatch.setattr("feature_extraction_server.core.job_runner.LOOK_INTERVAL_S", 0.01)


def picture_of(width: int) -> str:
    return encode_image(Image.new("RGB", (width, 3)))


def submit(client: FlaskClient, path: str, *widths: int) -> str:
    """Hand in a job for one picture, or for a batch of several, and return where it is."""
    pictures = [picture_of(width) for width in widths]
    response = client.post(path, json={"image": pictures if len(pictures) > 1 else pictures[0]})
    assert response.status_code == 202, response.text
    return response.headers["Location"]


def state_of(client: FlaskClient, location: str) -> str:
    return str(json_of(client.get(location))["state"])


# What is told at once


def test_a_job_is_accepted_with_its_place_and_gives_what_features_give(client: FlaskClient, picture: str) -> None:
    accepted = client.post(ECHO, json={"image": picture})
    told = json_of(accepted)
    job = json_of(client.get(accepted.headers["Location"] + WAIT))

    assert (accepted.status_code, accepted.headers["Location"]) == (202, f"/api/jobs/{told['id']}")
    assert (told["state"], told["queue_position"], told["ended"]) == ("queued", 1, None)
    assert (job["state"], job["task"], job["model"]) == ("succeeded", "image_captioning", "fake_echo")
    assert job["result"] == json_of(client.post(ECHO.replace("jobs", "features"), json={"image": picture}))
    assert job["progress"] == {"done": 1, "total": 1}
    assert job["created"] <= job["started"] <= job["ended"] < job["expires"]
    assert "error" not in job


def test_a_job_for_which_there_is_no_thread_is_run_when_there_is(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    refused: list[str] = []

    def start_but_not_at_first(thread: threading.Thread) -> None:
        if thread.name.startswith("job-") and len(refused) < 2:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_but_not_at_first)

    job = json_of(client.get(submit(client, ECHO, 40) + WAIT))

    assert (job["state"], len(refused)) == ("succeeded", 2)


def test_a_job_that_names_no_model_is_the_default_one_s(client_with: MakeClient, picture: str) -> None:
    client = client_with(DEFAULT_MODEL_IMAGE_CAPTIONING="fake_echo")

    accepted = client.post("/api/tasks/image_captioning/jobs", json={"image": picture})

    assert json_of(accepted)["model"] == "fake_echo"


def test_a_job_is_handed_in_as_a_form_too(client: FlaskClient) -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, "PNG")
    files = [(io.BytesIO(file.getvalue()), f"{n}.png") for n in range(2)]

    accepted = client.post(ECHO, data={"image": files})

    job = json_of(client.get(accepted.headers["Location"] + WAIT))
    assert job["result"] == [["40x30 (255, 0, 0)"]] * 2


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/api/tasks/nonsense/jobs", {}, 404, "task_not_found"),
        ("/api/tasks/image_captioning/models/nobody/jobs", {}, 404, "model_not_found"),
        ("/api/tasks/image_captioning/models/whisper/jobs", {}, 404, "task_not_supported"),
        ("/api/tasks/image_captioning/jobs", {"image": "x"}, 400, "no_default"),
        (ECHO, {}, 400, "invalid_input"),
        (ECHO, {"image": "x", "picture": "x"}, 400, "invalid_input"),
        (ECHO, {"image": "x", "config": 3}, 400, "invalid_input"),
        (ECHO, {"image": ["x", 3]}, 400, "invalid_input"),
        (ECHO.replace("image_c", "conditional_image_c"), {"image": "x", "text": 3}, 400, "invalid_input"),
        ("/api/tasks/fake_shout/models/fake_echo/jobs", {"nonsense": 1}, 400, "invalid_input"),
        (ECHO.replace("fake_echo", "blip"), {"image": "x", "config": {"nonsense": 3}}, 400, "invalid_input"),
        (ECHO, {"image": ["x"] * 2000}, 413, "too_large"),
        (ECHO.replace("image_c", "conditional_image_c"), {"image": ["x"], "text": ["a", "b"]}, 400, "invalid_input"),
        (ECHO, [], 400, "invalid_input"),
    ],
    ids=[
        "unknown task",
        "unknown model",
        "model of other tasks",
        "no default",
        "missing key",
        "unknown key",
        "config of another type",
        "an item of another type",
        "a text of another type",
        "unknown key of a task written by hand",
        "unknown key of config",
        "too many items",
        "lists of unequal length",
        "no object",
    ],
)
def test_what_can_be_told_without_running_a_job_is_told_at_once(
    client: FlaskClient, path: str, body: Any, status: int, code: str
) -> None:
    response = client.post(path, json=body)

    assert (response.status_code, json_of(response)["code"]) == (status, code)
    assert json_of(client.get("/api/jobs")) == []


def test_more_jobs_than_may_wait_are_refused_with_when_to_come_again(client_with: MakeClient, gated: Any) -> None:
    client = client_with(MAX_QUEUED_JOBS="1", MAX_BATCH_SIZE="1")
    for _ in range(3):  # two run at a time
        submit(client, GATED, 1)

    refused = client.post(GATED, json={"image": picture_of(1)})

    assert (refused.status_code, json_of(refused)["code"]) == (429, "queue_full")
    assert int(refused.headers["Retry-After"]) > 0


def test_nothing_is_opened_or_started_before_a_job_comes(client: FlaskClient, picture: str) -> None:
    client.post(ECHO.replace("jobs", "features"), json={"image": picture})

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("job")]


# What a job tells


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_an_unknown_job_is_a_404(client: FlaskClient, method: str) -> None:
    response = client.open("/api/jobs/nonsense", method=method)

    assert (response.status_code, json_of(response)["code"]) == (404, "not_found")


def test_a_bad_item_is_the_job_s_error_as_features_would_answer_it(client: FlaskClient, picture: str) -> None:
    body = {"image": [picture, "no picture"]}

    location = client.post(ECHO, json=body).headers["Location"]
    job = json_of(client.get(location + WAIT))

    assert (job["state"], "result" in job) == ("failed", False)
    assert job["error"] == json_of(client.post(ECHO.replace("jobs", "features"), json=body))


def test_an_error_names_the_item_by_its_place_in_the_whole_list(client_with: MakeClient, picture: str) -> None:
    client = client_with(MAX_BATCH_SIZE="2")

    location = client.post(ECHO, json={"image": [picture] * 5 + ["no picture"]}).headers["Location"]

    error = json_of(client.get(location + WAIT))["error"]
    assert error["field"] == "image[5]"
    assert error["error"].startswith("image[5]")


def test_a_job_larger_than_a_batch_shows_its_progress_and_keeps_the_order(client_with: MakeClient, gated: Any) -> None:
    client = client_with(MAX_BATCH_SIZE="2")
    location = submit(client, GATED, 1, 2, 3, 4, 5)

    gated.passes.release()
    wait_until(lambda: json_of(client.get(location))["progress"] == {"done": 2, "total": 5})
    assert state_of(client, location) == "running"

    gated.passes.release(2)
    job = json_of(client.get(location + WAIT))
    assert job["result"] == [[f"{width} wide"] for width in range(1, 6)]
    assert job["progress"] == {"done": 5, "total": 5}


def test_a_model_s_failure_is_the_job_s_error(client: FlaskClient) -> None:
    job = json_of(client.get(submit(client, ECHO.replace("fake_echo", "fake_slow"), 1) + WAIT))

    assert (job["state"], job["error"]["code"]) == ("failed", "model_error")
    assert "one pixel wide" in job["error"]["error"]


def test_a_model_that_cannot_be_loaded_is_the_job_s_error(client: FlaskClient) -> None:
    job = json_of(client.get(submit(client, ECHO.replace("fake_echo", "fake_broken"), 2) + WAIT))

    assert (job["state"], job["error"]["code"]) == ("failed", "model_load_failed")
    assert "no weights here" in job["error"]["error"]


def test_a_task_written_by_hand_is_run_as_a_job(client: FlaskClient) -> None:
    path = "/api/tasks/fake_shout/models/fake_echo/jobs"

    good, bad = (client.post(path, json=body).headers["Location"] for body in ({"text": "ho"}, {"text": 1}))

    assert json_of(client.get(good + WAIT))["result"] == "HO!"
    assert json_of(client.get(bad + WAIT))["error"]["code"] == "invalid_input"


def test_a_job_tells_its_place_among_those_that_wait_for_its_model(client_with: MakeClient, gated: Any) -> None:
    client = client_with(MAX_BATCH_SIZE="1")

    locations = [submit(client, GATED, 1) for _ in range(4)]

    jobs = [json_of(client.get(location)) for location in locations]
    assert [job["state"] for job in jobs] == ["running", "running", "queued", "queued"]
    assert [job["queue_position"] for job in jobs] == [None, None, 1, 2]
    assert json_of(client.get("/api/jobs")) == jobs[::-1]


def test_jobs_of_one_model_keep_no_other_model_s_waiting(client_with: MakeClient, gated: Any) -> None:
    client = client_with(MAX_BATCH_SIZE="1")
    for _ in range(4):
        submit(client, GATED, 1)

    assert state_of(client, submit(client, ECHO, 1) + WAIT) == "succeeded"


def test_jobs_that_wait_share_calls_of_the_model(build: Callable[..., Engine], gated: Any) -> None:
    engine = build()
    client = create_app(engine).test_client()
    locations = [submit(client, GATED, 1)]
    wait_until(lambda: len(gated.calls) == 1)
    locations += [submit(client, GATED, width) for width in range(2, 12)]
    wait_until(lambda: json_of(client.get("/api/models/gated/status"))["queue_depth"] == 10)
    run = engine.models["gated"]._run
    assert run is not None
    wait_until(lambda: all(job.is_complete for job in run.queue), "the pictures to be decoded")

    gated.passes.release(2)

    assert [state_of(client, location + WAIT) for location in locations] == ["succeeded"] * 11
    assert sorted(map(len, gated.calls)) == [1, 10]


def test_a_job_waits_for_room_in_the_model_s_queue(client_with: MakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_extraction_server.core.job_runner.MAX_RETRY_DELAY_S", 0.01)
    client = client_with(MAX_QUEUE_SIZE="1", MAX_BATCH_SIZE="8", FAKE_SECONDS="0.01")
    path = ECHO.replace("fake_echo", "fake_slow")

    locations = [submit(client, path, width) for width in range(2, 8)]

    assert [state_of(client, location + WAIT) for location in locations] == ["succeeded"] * 6


def test_a_job_that_takes_too_long_fails(client_with: MakeClient, gated: Any) -> None:
    client = client_with(JOB_TIMEOUT="0.2")

    error = json_of(client.get(submit(client, GATED, 1) + WAIT))["error"]

    assert error["code"] == "deadline_exceeded"
    assert "JOB_TIMEOUT" in error["error"]


@pytest.mark.usefixtures("no_crash_delay")
def test_a_job_that_loses_its_model_is_run_again(
    client_with: MakeClient, plugin: Callable[[str, str, str], None]
) -> None:
    plugin("models", "unlucky", UNLUCKY_SOURCE)
    client = client_with(UNLUCKY_CALLS="2")

    job = json_of(client.get(submit(client, UNLUCKY, 1) + WAIT))

    assert (job["state"], job["result"]) == ("succeeded", ["call 3"])


@pytest.mark.usefixtures("no_crash_delay")
def test_a_job_that_always_loses_its_model_fails_in_the_end(
    client_with: MakeClient, plugin: Callable[[str, str, str], None]
) -> None:
    plugin("models", "unlucky", UNLUCKY_SOURCE)
    client = client_with(UNLUCKY_CALLS="1000")

    job = json_of(client.get(submit(client, UNLUCKY, 1) + WAIT))

    assert (job["state"], job["error"]["code"]) == ("failed", "model_unavailable")


# Where a result comes from


@pytest.mark.parametrize("asked", ["", "&meta=1", "&meta=true"])
def test_a_result_tells_where_it_comes_from(client_with: MakeClient, versioned: Any, asked: str) -> None:
    client = client_with()
    versioned.passes.release()

    job = json_of(client.get(submit(client, VERSIONED + f"?{asked[1:]}", 1) + WAIT + asked))

    origin = {"checkpoint": "mine", "revision": "one", "dtype": None, "device": None, "plugin_version": None}
    assert job["result"] == ["1 of one"]
    assert job["meta"].items() >= (origin | {"task": "image_captioning", "model": "versioned"}).items()
    assert job["meta"]["computed_seconds"] > 0


def test_a_result_comes_without_its_origin_where_that_is_not_wanted(client: FlaskClient) -> None:
    location = submit(client, ECHO, 1)

    job = json_of(client.get(location + WAIT + "&meta=0"))

    assert "result" in job
    assert "meta" not in job


def test_meta_in_the_query_is_no_key_of_the_input(client: FlaskClient) -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 3)).save(file, "PNG")

    accepted = client.post(ECHO + "?meta=1", data=file.getvalue(), content_type="image/png")

    assert json_of(client.get(accepted.headers["Location"] + WAIT))["result"] == ["4x3 (0, 0, 0)"]


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_meta_that_is_neither_yes_nor_no_is_refused(client: FlaskClient, picture: str, method: str) -> None:
    path = ECHO if method == "POST" else submit(client, ECHO, 1)

    response = client.open(path + "?meta=2", method=method, json={"image": picture})

    assert (response.status_code, json_of(response)["field"]) == (400, "meta")


def test_all_items_of_a_result_come_from_the_same_weights_though_they_change_meanwhile(
    client_with: MakeClient, versioned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_with(MAX_BATCH_SIZE="2")
    location = submit(client, VERSIONED, 1, 2, 3, 4, 5)
    wait_until(lambda: len(versioned.calls) == 1)
    wait_until(lambda: json_of(client.get("/api/models/versioned/status"))["queue_depth"] == 1)

    monkeypatch.setenv("VERSIONED_REVISION", "two")
    client.post("/api/models/versioned/stop")
    versioned.passes.release(10)

    job = json_of(client.get(location + WAIT))
    assert job["result"] == [[f"{width} of two"] for width in range(1, 6)]
    assert job["meta"]["revision"] == "two"
    assert job["progress"] == {"done": 5, "total": 5}
    assert sum(map(len, versioned.calls)) == 5 + 4


def test_a_batch_tells_the_times_of_all_its_pieces(client_with: MakeClient) -> None:
    client = client_with(MAX_BATCH_SIZE="1", FAKE_SECONDS="0.02")

    job = json_of(client.get(submit(client, ECHO.replace("fake_echo", "fake_slow"), 2, 3, 4, 5) + WAIT))

    assert job["meta"]["computed_seconds"] >= 4 * 0.02


# Waiting


def test_waiting_ends_when_the_job_does(client_with: MakeClient, gated: Any, pool: ThreadPoolExecutor) -> None:
    client = client_with()
    location = submit(client, GATED, 1)
    waiting = [pool.submit(client.application.test_client().get, location + WAIT) for _ in range(3)]
    wait_until(lambda: len(gated.calls) == 1)
    assert not any(answer.done() for answer in waiting)

    gated.passes.release()

    assert [json_of(answer.result(TIMEOUT_S))["state"] for answer in waiting] == ["succeeded"] * 3


def run_one(build: Callable[..., Engine], gated: Any) -> tuple[FlaskClient, str, JobRunner]:
    """Return a client, where a job is of which the model is at work, and what runs it."""
    engine = build()
    client = create_app(engine).test_client()
    location = submit(client, GATED, 1)
    wait_until(lambda: gated.calls == [[1]])
    assert engine.jobs is not None
    return client, location, engine.jobs


def test_a_job_that_is_given_up_though_nobody_wants_that_is_run_again(
    build: Callable[..., Engine], gated: Any, no_crash_delay: None
) -> None:
    client, location, runner = run_one(build, gated)
    (run,) = runner._runs

    run.given_up.set()
    wait_until(lambda: run not in runner._runs)
    gated.passes.release(2)

    assert json_of(client.get(location + WAIT))["state"] == "succeeded"


def test_the_end_of_a_run_ends_no_other_run_of_the_same_job(
    build: Callable[..., Engine], gated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, runner = run_one(build, gated)
    (run,) = runner._runs

    monkeypatch.setattr(runner, "_outcome", lambda run, record: None)
    runner._work(replace(run))  # the one before, which has lost its model, and told the store so

    assert not run.given_up.is_set()


@pytest.mark.parametrize("widths", [[1], range(1, 40)], ids=["one", "batch"])
def test_a_plugin_that_ends_the_program_fails_its_job(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, widths: Sequence[int]
) -> None:
    monkeypatch.setattr(ApplicationInterface, "run", lambda *arguments, **options: sys.exit(4))

    job = json_of(client.get(submit(client, ECHO, *widths) + WAIT))

    assert (job["state"], job["error"]["code"]) == ("failed", "internal_error")


def test_a_result_that_cannot_be_stored_fails_the_job(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise sqlite3.DataError("string or blob too big")

    monkeypatch.setattr(JobStore, "succeed", refuse)

    job = json_of(client.get(submit(client, ECHO, 1) + WAIT))

    assert (job["state"], job["error"]["code"]) == ("failed", "internal_error")
    assert "could not store" in job["error"]["error"]


def test_a_job_waits_for_a_model_whose_load_failed_for_a_passing_reason(
    client_with: MakeClient, plugin: Callable[[str, str, str], None], gated: Any
) -> None:
    client = client_with(LOAD_RETRY_DELAY="0.05")
    failures = [ModelUnavailable("no cluster yet", retry_after=5)]

    def load_model() -> None:
        if failures:
            raise failures.pop()

    gated.load_model = load_model
    gated.passes.release()

    job = json_of(client.get(submit(client, GATED, 1) + WAIT))

    assert (job["state"], job["result"]) == ("succeeded", ["1 wide"])


def test_who_waits_for_a_job_is_answered_at_the_end_of_the_process(
    build: Callable[..., Engine], gated: Any, pool: ThreadPoolExecutor
) -> None:
    client, location, runner = run_one(build, gated)
    answer = pool.submit(client.get, location + WAIT)
    wait_until(lambda: bool(runner._waiting))

    gated.passes.release()
    runner.close()

    assert answer.result(TIMEOUT_S).status_code == 200


def test_who_waits_for_a_job_keeps_no_other_request_from_its_turn(client_with: MakeClient, gated: Any) -> None:
    client = client_with()
    location = submit(client, GATED, 1)
    turns = Turns(1, 2)
    begun, ended = threading.Event(), threading.Event()

    turns.submit(lambda: ended.set() if client.get(location + WAIT).status_code == 200 else None)
    turns.submit(begun.set)

    assert begun.wait(TIMEOUT_S)
    assert not ended.is_set()
    gated.passes.release()
    assert ended.wait(TIMEOUT_S)
    turns.shutdown()


def test_waiting_ends_when_the_time_is_up(client_with: MakeClient, gated: Any) -> None:
    client = client_with()
    location = submit(client, GATED, 1)

    assert state_of(client, location + "?wait=0.05") == "running"


def test_waiting_has_an_end_however_long_a_client_wants_to_wait(
    client_with: MakeClient, gated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_with()
    monkeypatch.setattr("feature_extraction_server.apis.jobs_api.MAX_WAIT_S", 0.05)
    location = submit(client, GATED, 1)

    assert state_of(client, location + "?wait=1e9") == "running"


@pytest.mark.parametrize("text", ["-1", "nan", "soon", ""])
def test_a_wait_that_is_no_time_is_refused(client: FlaskClient, text: str) -> None:
    response = client.get(f"/api/jobs/nonsense?wait={text}")

    assert (response.status_code, json_of(response)["field"]) == (400, "wait")


# Cancelling and removing


def test_a_cancelled_job_that_waited_never_runs(client_with: MakeClient, gated: Any) -> None:
    client = client_with(MAX_BATCH_SIZE="1")
    first, second, third = (submit(client, GATED, width) for width in (1, 2, 3))

    cancelled = client.delete(third)
    gated.passes.release(2)

    assert json_of(cancelled)["state"] == "cancelled"
    assert [state_of(client, location + WAIT) for location in (first, second)] == ["succeeded"] * 2
    assert [3] not in gated.calls


def test_cancelling_a_running_job_drops_its_result_and_wakes_who_waits(
    client_with: MakeClient, gated: Any, pool: ThreadPoolExecutor
) -> None:
    client = client_with()
    location = submit(client, GATED, 1)
    waiting = pool.submit(client.application.test_client().get, location + WAIT)
    wait_until(lambda: len(gated.calls) == 1)

    client.delete(location)

    assert json_of(waiting.result(TIMEOUT_S))["state"] == "cancelled"
    gated.passes.release()
    assert state_of(client, submit(client, ECHO, 1) + WAIT) == "succeeded"
    assert state_of(client, location) == "cancelled"


def test_cancelling_a_running_job_makes_room_for_the_next(client_with: MakeClient, gated: Any) -> None:
    client = client_with(MAX_BATCH_SIZE="1")
    first, second, third = (submit(client, GATED, width) for width in (1, 2, 3))
    assert state_of(client, third) == "queued"

    client.delete(first)
    client.delete(second)

    wait_until(lambda: state_of(client, third) == "running")


def test_deleting_a_job_that_has_ended_removes_it(client: FlaskClient) -> None:
    location = submit(client, ECHO, 1)
    client.get(location + WAIT)

    removed = client.delete(location)

    assert (removed.status_code, removed.data) == (204, b"")
    assert client.get(location).status_code == 404


def test_a_job_expires(client_with: MakeClient) -> None:
    client = client_with(JOB_TTL="0.05")
    location = submit(client, ECHO, 1)

    wait_until(lambda: client.get(location).status_code == 404)

    assert json_of(client.get("/api/jobs")) == []


# Lists


def test_jobs_are_listed_without_results_the_newest_first(client: FlaskClient) -> None:
    locations = [submit(client, ECHO, width) for width in (1, 2, 3)]
    for location in locations:
        client.get(location + WAIT)

    jobs = json_of(client.get("/api/jobs"))

    assert [f"/api/jobs/{job['id']}" for job in jobs] == locations[::-1]
    assert not any("result" in job for job in jobs)
    assert [job["id"] for job in json_of(client.get("/api/jobs?limit=1"))] == [jobs[0]["id"]]


def test_jobs_are_listed_by_state(client_with: MakeClient, gated: Any) -> None:
    client = client_with(MAX_BATCH_SIZE="1")
    locations = [submit(client, GATED, 1) for _ in range(3)]

    found = {state: json_of(client.get(f"/api/jobs?state={state}")) for state in ("queued", "running", "failed")}

    assert {state: len(jobs) for state, jobs in found.items()} == {"queued": 1, "running": 2, "failed": 0}
    assert locations[2].endswith(found["queued"][0]["id"])


@pytest.mark.parametrize(
    "query", ["state=nonsense", "limit=0", "limit=1001", "limit=-1", "limit=x", "limit=²", "stat=queued"]
)
def test_a_bad_filter_is_refused(client: FlaskClient, query: str) -> None:
    response = client.get(f"/api/jobs?{query}")

    assert (response.status_code, json_of(response)["field"]) == (400, query.partition("=")[0])


# With a file


def test_jobs_that_were_not_done_run_after_a_restart_unasked(
    build: Callable[..., Engine], gated: Any, tmp_path: Path
) -> None:
    path = tmp_path / "jobs.sqlite3"
    first = build(JOBS_PATH=str(path), MAX_BATCH_SIZE="1")
    locations = [submit(create_app(first).test_client(), GATED, width) for width in (1, 2, 3, 4)]
    wait_until(lambda: len(gated.calls) == 1)
    gated.passes.release()
    wait_until(lambda: count(path, "succeeded") == 1)
    assert first.jobs is not None
    first.jobs.close()

    gated.passes.release(100)
    second = create_app(build(JOBS_PATH=str(path)))

    wait_until(lambda: count(path, "succeeded") == 4)
    client = second.test_client()
    assert [json_of(client.get(location))["result"] for location in locations] == [[f"{n} wide"] for n in (1, 2, 3, 4)]


def test_results_keep_their_origins_over_a_restart_with_other_weights(
    build: Callable[..., Engine], versioned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "jobs.sqlite3"
    first = build(JOBS_PATH=str(path), MAX_BATCH_SIZE="1")
    client = create_app(first).test_client()
    locations = [submit(client, VERSIONED, 1)]
    versioned.passes.release()
    wait_until(lambda: count(path, "succeeded") == 1)
    locations.append(submit(client, VERSIONED, 2))  # not before: either of two could be the first
    assert first.jobs is not None
    first.jobs.close()

    monkeypatch.setenv("VERSIONED_REVISION", "two")
    versioned.passes.release(10)
    client = create_app(build(JOBS_PATH=str(path))).test_client()

    jobs = [json_of(client.get(location + WAIT)) for location in locations]
    assert [(job["result"], job["meta"]["revision"]) for job in jobs] == [(["1 of one"], "one"), (["2 of two"], "two")]


def count(path: Path, state: str) -> int:
    """Return how many jobs of a file are in a state."""
    database = sqlite3.connect(path)
    try:
        ((n,),) = database.execute("SELECT count(*) FROM jobs WHERE state = ?", (state,))
        return int(n)
    finally:
        database.close()


@pytest.mark.parametrize(
    "name", ["folder", "no_jobs.txt", "file/jobs.sqlite3"], ids=["a folder", "another file", "below a file"]
)
def test_a_path_where_no_jobs_can_be_kept_is_told_before_the_server_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "no_jobs.txt").write_text("something else " * 100)
    environment = {"LOG_PATH": str(tmp_path / "log.txt"), "JOBS_PATH": str(tmp_path / name)}

    with pytest.raises(SystemExit) as caught:
        build_engine(SettingsManager(environment, tmp_path / ".env"))

    assert caught.value.code == 2
    assert f"JOBS_PATH={str(tmp_path / name)!r} is not allowed" in capsys.readouterr().err


def test_a_store_that_cannot_be_written_to_is_told(
    client: FlaskClient, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(*arguments: object, **options: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("feature_extraction_server.core.job_store.JobStore.add", add)

    response: TestResponse = client.post(ECHO, json={"image": picture})

    assert response.status_code == 500
    assert "database or disk is full" in json_of(response)["error"]


def test_the_end_of_the_server_does_not_wait_for_jobs(build: Callable[..., Engine], gated: Any) -> None:
    engine = build(STOP_GRACE_PERIOD="0")
    client = create_app(engine).test_client()
    submit(client, GATED, 1)
    wait_until(lambda: len(gated.calls) == 1)

    began = time.monotonic()
    assert engine.jobs is not None
    engine.jobs.close()

    assert time.monotonic() - began < TIMEOUT_S / 2
