"""The engine process from its socket: what many connections cost, and that none of them keeps the others waiting."""

from __future__ import annotations

import os
import pickle
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from feature_extraction_server.core.engine_client import REST_WANTED, EngineClient
from feature_extraction_server.core.errors import DeadlineExceeded, ModelUnavailable
from feature_extraction_server.core.jobs import Call
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.setup import set_up
from feature_extraction_server.core.wire import Channel, connect
from tests.waiting import wait_until

pytestmark = pytest.mark.process

WAIT_S = 20
LARGE = 5_000_000
# Answers when the test has made a file; before its first call, load_model waits for one, too.
MODEL = """
import pathlib, threading, time
folder = pathlib.Path({folder!r})

def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.01)

def load_model():
    wait_for("may load")

def no_thread(thread):
    raise RuntimeError("can't start new thread")

def echo(x):
    if "wait" in x[0]:
        wait_for("may run")
    if "no thread" in x[0]:
        threading.Thread.start = no_thread
    return [one * ({large} if "large" in one else 1) for one in x]

def size(image):
    return [one.size for one in image]
"""


class Engine:
    """An engine process, and connections to it."""

    def __init__(self, client: EngineClient, folder: Path) -> None:
        self.client = client
        self._folder = folder
        self._opened: list[Channel] = []

    def let(self, what: str) -> None:
        (self._folder / what).touch()

    def connect(self) -> Channel:
        channel = connect(str(self.client.shared_directory / "engine"), WAIT_S, WAIT_S)
        self._opened.append(channel)
        return channel

    def status(self) -> dict[str, Any]:
        return self.client.status("fake_engine_model")

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.status()["engine_pid"])

    def close(self) -> None:
        self.let("may run")
        self.let("may load")
        for channel in self._opened:
            channel.close()
        self.client.close()


@pytest.fixture
def start(
    tmp_path: Path, plugin: Callable[[str, str, str], None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def start(*, is_loaded: bool = True, **settings: str) -> Engine:
        plugin("models", "fake_engine_model", MODEL.format(folder=str(tmp_path), large=LARGE))
        plugin("models", "fake_other_model", MODEL.format(folder=str(tmp_path), large=LARGE))
        # So often only: what is to be noticed at once does not wait for it.
        settings = {
            "LOG_PATH": str(tmp_path / "log.txt"),
            "RESULT_CHECK_INTERVAL": "60",
            "MAX_BATCH_SIZE": "1",
        } | settings
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        registry, manager, _ = set_up(SettingsManager(settings, tmp_path / ".env"))
        engines.append(Engine(EngineClient(registry, manager, os.getpid()), tmp_path))
        if is_loaded:
            engines[-1].let("may load")
        engines[-1].client.start("fake_engine_model", wait=is_loaded)
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def request(call: Call, *, has_rest: bool = False, timeout_s: float = WAIT_S, model: str = "fake_engine_model") -> Any:
    return (None, False, "call", model, tuple(call._replace(rest=None)), has_rest, time.monotonic() + timeout_s)


def echo(text: str, **options: Any) -> Any:
    return request(Call("echo", {"x": [text]}, ("x",)), **options)


def answer(channel: Channel) -> Any:
    succeeded, result, *_ = channel.receive()
    return result if succeeded else (type(result), result.message)


def asked(channel: Channel, message: Any) -> Any:
    channel.send(message)
    return answer(channel)


def half_sent(channel: Channel, message: Any) -> tuple[socket.socket, bytes]:
    """Send the first half of a message, and return what is left of it."""
    pickled = pickle.dumps(message)
    data = struct.pack("<IQ", 0, len(pickled)) + pickled
    connected: socket.socket = channel._socket
    connected.sendall(data[: len(data) // 2])
    return connected, data[len(data) // 2 :]


def test_calls_that_wait_cost_no_thread_each_and_have_their_own_answers(start: Callable[..., Engine]) -> None:
    engine = start()
    before = engine.process.num_threads()
    channels = [engine.connect() for _ in range(200)]

    for n, channel in enumerate(channels):
        channel.send(echo(f"wait {n}"))
    wait_until(lambda: engine.status()["queue_depth"] == 199)

    assert engine.process.num_threads() <= before + 2
    engine.let("may run")
    assert [answer(channel) for channel in channels] == [[f"wait {n}"] for n in range(200)]


def test_an_answer_that_nobody_takes_keeps_no_other_waiting(start: Callable[..., Engine]) -> None:
    engine = start()
    frozen, other = engine.connect(), engine.connect()

    frozen.send(echo("large"))

    assert asked(other, echo("next")) == ["next"]
    assert answer(frozen) == ["large" * LARGE]
    assert asked(frozen, echo("and again")) == ["and again"]


def test_a_connection_that_is_closed_before_its_large_answer_is_taken_leaves_nothing_behind(
    start: Callable[..., Engine],
) -> None:
    engine = start()
    other, process = engine.connect(), engine.process
    assert asked(other, echo("first")) == ["first"]
    n_threads, n_files = process.num_threads(), process.num_fds()
    leaver = engine.connect()
    leaver.send(echo("large"))
    assert asked(other, echo("next")) == ["next"]

    leaver.close()

    wait_until(lambda: process.num_threads() <= n_threads and process.num_fds() <= n_files)


def test_a_large_answer_for_which_there_is_no_thread_ends_its_connection_alone(start: Callable[..., Engine]) -> None:
    engine = start()
    channel, other = engine.connect(), engine.connect()
    assert asked(other, echo("no thread is left")) == ["no thread is left"]

    channel.send(echo("large"))

    with pytest.raises((EOFError, ConnectionResetError)):
        answer(channel)
    assert asked(other, echo("next")) == ["next"]


def test_a_message_that_comes_in_pieces_keeps_no_other_waiting(start: Callable[..., Engine]) -> None:
    engine = start()
    slow, other = engine.connect(), engine.connect()

    connected, rest = half_sent(slow, echo("in two pieces"))

    assert asked(other, echo("at once")) == ["at once"]
    connected.sendall(rest)
    assert answer(slow) == ["in two pieces"]
    assert asked(slow, echo("in one piece")) == ["in one piece"]


def test_what_cannot_be_read_ends_its_connection_alone(start: Callable[..., Engine]) -> None:
    engine = start()
    broken, other = engine.connect(), engine.connect()

    broken._socket.sendall(struct.pack("<IQ", 0, 7) + b"garbage")

    with pytest.raises(EOFError):
        broken.receive()
    assert asked(other, echo("next")) == ["next"]


def test_a_call_whose_web_worker_leaves_is_given_up_at_once(start: Callable[..., Engine]) -> None:
    engine = start()
    at_work, waiting = engine.connect(), engine.connect()
    at_work.send(echo("wait"))
    wait_until(lambda: engine.status()["running_jobs"] == 1)
    waiting.send(echo("next"))
    wait_until(lambda: engine.status()["queue_depth"] == 1)

    waiting.close()

    wait_until(lambda: engine.status()["queue_depth"] == 0)
    engine.let("may run")
    assert answer(at_work) == ["wait"]
    assert engine.status()["counts"]["failures"] == 0


def test_a_call_whose_web_worker_is_frozen_ends_soon_after_its_deadline(start: Callable[..., Engine]) -> None:
    engine = start()
    channel = engine.connect()

    late = asked(channel, echo("wait", timeout_s=0.2))

    assert late == (DeadlineExceeded, "the model fake_engine_model gave no answer in time (REQUEST_TIMEOUT)")
    assert engine.status()["counts"]["failures"] == 1


def test_a_call_of_a_model_that_is_not_loaded_yet_keeps_no_other_waiting(start: Callable[..., Engine]) -> None:
    engine = start(is_loaded=False, MAX_LOADED_MODELS="1")
    first, other = engine.connect(), engine.connect()
    first.send(echo("first"))

    no_room = asked(other, echo("no room", timeout_s=0.3, model="fake_other_model"))

    assert no_room[0] is ModelUnavailable
    assert "MAX_LOADED_MODELS" in no_room[1]
    engine.let("may load")
    assert answer(first) == ["first"]


def test_the_rest_of_a_call_comes_when_it_is_asked_for(start: Callable[..., Engine]) -> None:
    engine = start()
    channel = engine.connect()
    in_parts = request(Call("size", {}, ("image",), n_items=1), has_rest=True)

    for size in [(40, 30), (3000, 2000)]:
        channel.send(in_parts)
        assert channel.receive() is REST_WANTED
        assert asked(channel, {"image": [Image.new("RGB", size)]}) == [size]


def test_a_rest_that_crosses_the_end_of_its_call_is_not_taken_for_a_request(start: Callable[..., Engine]) -> None:
    engine = start()
    channel = engine.connect()
    channel.send(request(Call("echo", {}, ("x",), n_items=1), has_rest=True, timeout_s=0.2))
    assert channel.receive() is REST_WANTED
    wait_until(lambda: engine.status()["counts"]["failures"] == 1)

    channel.send({"x": ["too late"]})

    assert answer(channel)[0] is DeadlineExceeded
    assert asked(channel, echo("next")) == ["next"]


def test_an_answered_call_keeps_no_picture(start: Callable[..., Engine]) -> None:
    engine = start()
    channel = engine.connect()

    def regions_mapped() -> int:
        return sum("memfd" in mapped.path for mapped in engine.process.memory_maps(grouped=False))

    for n in range(5):
        call = Call("size", {"image": [Image.new("RGB", (300 + n, 200))]}, ("image",))
        assert asked(channel, request(call)) == [(300 + n, 200)]

    assert regions_mapped() <= 1


def test_no_connection_is_lost_when_all_workers_come_at_once(start: Callable[..., Engine]) -> None:
    engine = start()

    with closing(engine.connect()) as first:
        channels = [engine.connect() for _ in range(300)]
        answers = [asked(channel, echo(str(n))) for n, channel in enumerate(channels)]
        assert asked(first, echo("first")) == ["first"]

    assert answers == [[str(n)] for n in range(300)]
