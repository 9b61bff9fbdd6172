"""The engine over several models: who may be loaded at a time, and who makes room."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.errors import ClientDisconnected, ModelLoadFailed, ModelUnavailable
from feature_extraction_server.core.jobs import Call, Job
from tests.conftest import encode_image
from tests.waiting import wait_until

WAIT_S = 20
MODEL = """
import threading
may_run = threading.Event()
may_run.set()
called = threading.Event()

def load_model():
    pass

def image_captioning(image, config):
    called.set()
    assert may_run.wait(20)
    return [["done"] for _ in image]
"""
Build = Callable[..., Engine]


@pytest.fixture
def three(plugin: Callable[[str, str, str], None]) -> list[str]:
    """Three models that answer when the test lets them."""
    names = ["room_a", "room_b", "room_c"]
    for name in names:
        plugin("models", name, MODEL)
    return names


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as executor:
        yield executor


def ask(engine: Engine, model: str, picture: str) -> Any:
    return engine.run("image_captioning", model, {"image": picture})


def begin(engine: Engine, model: str, picture: str, pool: ThreadPoolExecutor) -> tuple[threading.Event, Future[Any]]:
    """Have a model at work; return what lets it go on, and its answer."""
    module = engine.registry.models[model]
    module.may_run.clear()
    answer = pool.submit(ask, engine, model, picture)
    assert module.called.wait(WAIT_S)
    return module.may_run, answer


def wait_for_room(engine: Engine, model: str, picture: str, pool: ThreadPoolExecutor) -> Future[Any]:
    """Have a request wait for room for its model; return its answer."""
    waiting = pool.submit(ask, engine, model, picture)
    wait_until(engine._starting.locked)
    return waiting


def states(engine: Engine, names: list[str]) -> list[str]:
    return [engine.status(name)["state"] for name in names]


def test_the_model_that_was_idle_longest_makes_room(build: Build, three: list[str], picture: str) -> None:
    engine = build(MAX_LOADED_MODELS="2")
    ask(engine, "room_a", picture)
    ask(engine, "room_b", picture)
    ask(engine, "room_a", picture)

    ask(engine, "room_c", picture)

    assert states(engine, three) == ["running", "stopped", "running"]


def test_a_preloaded_model_that_failed_is_started_again_where_there_is_room(
    build: Build,
    three: list[str],
    plugin: Callable[[str, str, str], None],
    picture: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("feature_extraction_server.core.model.MIN_RETRY_DELAY_S", 0)
    plugin("models", "room_d", MODEL.replace("    pass", "    raise OSError('no hub yet')", 1))
    engine = build(PRELOAD_MODELS="room_d", MAX_LOADED_MODELS="1", LOAD_RETRY_DELAY="0.05")
    engine.preload()
    wait_until(lambda: states(engine, ["room_d"]) == ["failed"])
    import feature_extraction_server.models.room_d as model  # type: ignore[import-not-found]

    model.load_model = lambda: None
    ask(engine, "room_a", picture)
    time.sleep(0.1)
    engine.retry_preloaded()
    without_room = states(engine, ["room_d", "room_a"])
    engine.stop("room_a", wait=True)
    engine.retry_preloaded()

    assert without_room == ["failed", "running"]
    wait_until(lambda: states(engine, ["room_d"]) == ["running"])


def test_a_model_that_has_just_failed_to_load_takes_no_other_s_room(
    build: Build, three: list[str], plugin: Callable[[str, str, str], None], picture: str
) -> None:
    plugin("models", "room_d", MODEL.replace("    pass", "    raise OSError('no such checkpoint')", 1))
    engine = build(MAX_LOADED_MODELS="1", LOAD_RETRY_DELAY="60")
    with pytest.raises(ModelLoadFailed):
        ask(engine, "room_d", picture)
    ask(engine, "room_a", picture)

    with pytest.raises(ModelLoadFailed, match="no such checkpoint"):
        ask(engine, "room_d", picture)

    assert states(engine, ["room_a", "room_d"]) == ["running", "failed"]
    assert engine.status("room_d")["counts"]["failed_loads"] == 1


@pytest.fixture
def at_work(
    build: Build, three: list[str], picture: str, pool: ThreadPoolExecutor
) -> tuple[Engine, threading.Event, Future[Any]]:
    """An engine with room for one model, which is at work; what lets it go on, and its answer."""
    engine = build(MAX_LOADED_MODELS="1", RESULT_CHECK_INTERVAL="0.01")
    return engine, *begin(engine, three[0], picture, pool)


def test_a_stop_calls_off_a_start_that_waits_for_room(
    at_work: tuple[Engine, threading.Event, Future[Any]], three: list[str]
) -> None:
    engine, may_run, answer = at_work

    engine.start("room_b")
    engine.stop("room_b", wait=True)
    may_run.set()

    assert answer.result(WAIT_S) == ["done"]
    time.sleep(0.2)  # many times as long as it waits between two looks for room
    assert states(engine, three) == ["running", "stopped", "stopped"]


def test_a_request_that_is_given_up_while_it_waits_for_room_takes_nobody_s(
    at_work: tuple[Engine, threading.Event, Future[Any]], three: list[str], picture: str, pool: ThreadPoolExecutor
) -> None:
    engine, may_run, answer = at_work
    with pytest.raises(ClientDisconnected):
        engine.run("image_captioning", "room_b", {"image": picture}, is_wanted=lambda: False)

    job = Job(Call("image_captioning", {"image": [None], "config": {}}, ("image",)))
    waiting = pool.submit(engine.submit, "room_b", job, time.monotonic() + WAIT_S)
    job.cancel()
    waiting.result(WAIT_S)
    may_run.set()

    assert answer.result(WAIT_S) == ["done"]
    assert states(engine, three) == ["running", "stopped", "stopped"]


def test_a_stop_calls_off_a_request_that_waits_for_room(
    at_work: tuple[Engine, threading.Event, Future[Any]], three: list[str], picture: str, pool: ThreadPoolExecutor
) -> None:
    engine, may_run, answer = at_work
    waiting = wait_for_room(engine, "room_b", picture, pool)

    engine.stop("room_b", wait=True)

    with pytest.raises(ModelUnavailable, match="room_b was stopped"):
        waiting.result(WAIT_S)
    may_run.set()
    assert answer.result(WAIT_S) == ["done"]
    assert states(engine, three) == ["running", "stopped", "stopped"]


def test_a_request_is_told_of_a_failed_load_while_another_one_waits_for_room(
    build: Build, three: list[str], plugin: Callable[[str, str, str], None], picture: str, pool: ThreadPoolExecutor
) -> None:
    plugin("models", "room_d", MODEL.replace("    pass", "    raise OSError('no such checkpoint')", 1))
    engine = build(MAX_LOADED_MODELS="1", LOAD_RETRY_DELAY="60", RESULT_CHECK_INTERVAL="0.01")
    with pytest.raises(ModelLoadFailed):
        ask(engine, "room_d", picture)
    may_run, answer = begin(engine, "room_a", picture, pool)
    waiting = wait_for_room(engine, "room_b", picture, pool)

    with pytest.raises(ModelLoadFailed, match="no such checkpoint"):
        ask(engine, "room_d", picture)

    assert not waiting.done()
    may_run.set()
    assert [one.result(WAIT_S) for one in (answer, waiting)] == [["done"]] * 2


def test_a_request_may_be_given_up_while_another_one_waits_for_room(
    at_work: tuple[Engine, threading.Event, Future[Any]], three: list[str], picture: str, pool: ThreadPoolExecutor
) -> None:
    engine, may_run, answer = at_work
    waiting = wait_for_room(engine, "room_b", picture, pool)
    looks = iter([True, True, False])

    with pytest.raises(ClientDisconnected):
        engine.run("image_captioning", "room_c", {"image": picture}, is_wanted=lambda: next(looks, False))

    assert not waiting.done()
    may_run.set()
    assert [one.result(WAIT_S) for one in (answer, waiting)] == [["done"]] * 2


def test_a_start_makes_room_too_and_returns_at_once(build: Build, three: list[str], picture: str) -> None:
    engine = build(MAX_LOADED_MODELS="1")
    ask(engine, "room_a", picture)

    engine.start("room_b")

    wait_until(lambda: states(engine, three) == ["stopped", "running", "stopped"])


def test_a_request_waits_until_a_model_at_work_is_idle(
    build: Build, three: list[str], picture: str, pool: ThreadPoolExecutor
) -> None:
    engine = build(MAX_LOADED_MODELS="1", RESULT_CHECK_INTERVAL="0.01")
    may_run, first = begin(engine, "room_a", picture, pool)

    second = pool.submit(ask, engine, "room_b", picture)
    assert states(engine, three) == ["running", "stopped", "stopped"]
    may_run.set()

    assert first.result(WAIT_S) == ["done"]
    assert second.result(WAIT_S) == ["done"]
    assert states(engine, three) == ["stopped", "running", "stopped"]


def test_no_room_in_time_is_an_error_that_says_so(
    build: Build, three: list[str], picture: str, pool: ThreadPoolExecutor
) -> None:
    engine = build(MAX_LOADED_MODELS="1", RESULT_CHECK_INTERVAL="0.01", REQUEST_TIMEOUT="0.3")
    may_run, _ = begin(engine, "room_a", picture, pool)

    with pytest.raises(ModelUnavailable, match="MAX_LOADED_MODELS"):
        ask(engine, "room_b", picture)

    may_run.set()


def test_never_more_than_allowed_are_loaded_and_every_request_is_answered(
    build: Build, three: list[str], picture: str, pool: ThreadPoolExecutor
) -> None:
    engine = build(MAX_LOADED_MODELS="2", RESULT_CHECK_INTERVAL="0.01")
    most = 0

    answers = [pool.submit(ask, engine, three[n % 3], picture) for n in range(60)]
    while not all(answer.done() for answer in answers):
        most = max(most, sum(state in ("loading", "running") for state in states(engine, three)))

    assert [answer.result(WAIT_S) for answer in answers] == [["done"]] * 60
    assert most <= 2


def test_a_model_that_ends_unasked_does_not_run_while_it_is_unloaded(
    build: Build, plugin: Callable[[str, str, str], None], picture: str, pool: ThreadPoolExecutor
) -> None:
    unloads = "\nunloads = threading.Event()\n\ndef unload_model():\n    unloads.set()\n    assert may_run.wait(20)\n"
    plugin("models", "room_a", MODEL + unloads)
    engine = build()
    ask(engine, "room_a", picture)
    model, module = engine.models["room_a"], engine.registry.models["room_a"]
    module.may_run.clear()

    end = pool.submit(model._current_run().end, "its consumer died")
    assert module.unloads.wait(WAIT_S)
    while_unloading = model.is_running
    module.may_run.set()
    end.result(WAIT_S)

    assert not while_unloading
    assert states(engine, ["room_a"]) == ["failed"]


SIZES = """
image_sizes = {"image_captioning": 100}

def load_model():
    pass

def image_captioning(image, config):
    return [[f"{picture.width} x {picture.height}"] for picture in image]

def conditional_image_captioning(image, text, config):
    return [[f"{picture.width} x {picture.height}"] for picture in image]
"""


@pytest.mark.parametrize(
    ("setting", "task", "expected"),
    [
        pytest.param("true", "image_captioning", "200 x 150", id="asked for"),
        pytest.param("false", "image_captioning", "400 x 300", id="off"),
        pytest.param("true", "conditional_image_captioning", "400 x 300", id="a task for which the model says nothing"),
    ],
)
def test_jpegs_are_decoded_at_the_size_that_a_model_needs(
    build: Build, plugin: Callable[[str, str, str], None], setting: str, task: str, expected: str
) -> None:
    plugin("models", "sizes", SIZES)
    engine = build(DRAFT_DECODING=setting)
    payload = {"image": encode_image(Image.new("RGB", (400, 300)), "JPEG")}
    if task == "conditional_image_captioning":
        payload["text"] = "a"

    assert engine.run(task, "sizes", payload) == [expected]
