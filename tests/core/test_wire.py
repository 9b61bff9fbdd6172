"""Messages between processes: what arrives is what was sent, and an end that goes away is noticed."""

from __future__ import annotations

import ctypes
import gc
import io
import os
import pickle
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from feature_extraction_server.core import pixels, wire
from feature_extraction_server.core.errors import ModelError
from feature_extraction_server.core.media import Audio
from feature_extraction_server.core.wire import Channel

WAIT_S = 20


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    first, second = map(Channel, socket.socketpair())
    for end in (first, second):
        end.set_patience(WAIT_S)
    yield first, second
    first.close()
    second.close()


def cross(ends: tuple[Channel, Channel], message: Any) -> Any:
    """Send from a thread of its own, since a large message waits for its reader."""
    sender = threading.Thread(target=ends[0].send, args=(message,))
    sender.start()
    received = ends[1].receive()
    sender.join(WAIT_S)
    return received


@pytest.mark.parametrize(
    "message",
    [None, ("call", "blip", {"text": ["ä", ""]}, 1.5), b"", b"x" * 5_000_000, [b"y" * 100_000] * 600],
    ids=["nothing", "a request", "no bytes", "5 MB", "600 parts"],
)
def test_what_is_sent_arrives(ends: tuple[Channel, Channel], message: Any) -> None:
    assert cross(ends, message) == message
    assert cross(ends, "next") == "next"


@pytest.mark.parametrize("make", [lambda: Image.new("RGB", (9, 9)), lambda: np.zeros(9)], ids=["picture", "array"])
def test_what_was_sent_is_not_kept(ends: tuple[Channel, Channel], make: Callable[[], Any]) -> None:
    message = {"x": make()}
    sent = weakref.ref(message["x"])
    gc.disable()  # it would find in the end what is kept
    try:
        cross(ends, message)
        message.clear()

        assert sent() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_a_picture_arrives_as_it_was(ends: tuple[Channel, Channel], mode: str) -> None:
    picture = Image.effect_noise((101, 77), 80).convert(mode)

    received = cross(ends, {"image": [picture]})["image"][0]

    assert (received.mode, received.size, received.tobytes()) == (picture.mode, picture.size, picture.tobytes())


def test_a_recording_arrives_as_it_was_and_outside_the_pickle(
    ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    audio = Audio(np.linspace(-1, 1, 1_000_000, dtype=np.float32), 16_000)
    pickled: list[int] = []

    class Recording(wire._Unpickler):
        def __init__(self, file: io.BytesIO, *rest: Any) -> None:
            pickled.append(len(file.getvalue()))
            super().__init__(file, *rest)

    monkeypatch.setattr(wire, "_Unpickler", Recording)

    received = cross(ends, audio)

    np.testing.assert_array_equal(received.samples, audio.samples)
    assert received.sampling_rate == 16_000
    assert pickled[0] < 1000


def test_pictures_of_one_message_arrive_in_their_order(ends: tuple[Channel, Channel]) -> None:
    pictures = [Image.new("RGB", (200 + n, 300), (n, 0, 0)) for n in range(9)]
    samples = np.arange(1000, dtype=np.float32)

    received = cross(ends, [pictures[0], samples, *pictures[1:], pictures[0]])

    assert [picture.getpixel((0, 0)) for picture in (received[0], *received[2:])] == [(n, 0, 0) for n in [*range(9), 0]]
    np.testing.assert_array_equal(received[1], samples)


def test_messages_that_come_together_are_told_apart(ends: tuple[Channel, Channel]) -> None:
    for n in range(3):
        ends[0].send(n)

    assert [ends[1].receive() for _ in range(3)] == [0, 1, 2]


def test_a_picture_is_not_taken_for_one_of_the_message_before(ends: tuple[Channel, Channel]) -> None:
    ends[0].send("no picture")
    ends[0].send(Image.new("RGB", (9, 9), "red"))

    received = [ends[1].receive(), ends[1].receive()]

    assert received[0] == "no picture"
    assert received[1].getpixel((0, 0)) == (255, 0, 0)


def test_pictures_stay_as_they_were_when_others_come(ends: tuple[Channel, Channel]) -> None:
    received = [cross(ends, Image.new("RGB", (9, 9), (n, 0, 0))) for n in range(5)]

    assert [picture.getpixel((8, 8)) for picture in received] == [(n, 0, 0) for n in range(5)]


def test_memory_that_the_other_end_may_still_have_when_it_goes_is_not_used_again(
    ends: tuple[Channel, Channel],
) -> None:
    pixels._kept.clear()
    ends[0].send(Image.new("RGB", (9, 9)))
    kept_before = len(pixels._kept)

    ends[0].close()

    assert (kept_before, len(pixels._kept)) == (1, 0)


def test_memory_that_is_used_once_is_kept_by_neither_end(
    ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels, "_kept", [])
    monkeypatch.setattr(pixels, "MAX_KEPT_BYTES", 0)
    before = len(os.listdir("/proc/self/fd"))

    received = cross(ends, Image.new("RGB", (9, 9), "red"))
    pixel = received.getpixel((8, 8))
    del received

    assert pixel == (255, 0, 0)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("message", [b"x" * 10_000_000, [b"x" * 10_000_000, Image.new("RGB", (9, 9))]])
def test_sending_ends_when_the_time_is_up(ends: tuple[Channel, Channel], message: Any) -> None:
    with pytest.raises(TimeoutError):
        ends[0].send(message, timeout_s=0.1)


def test_what_cannot_be_pickled_is_told_before_anything_is_sent(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        ends[0].send(threading.Lock())

    assert cross(ends, "still in step") == "still in step"


def deep(n_levels: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(n_levels):
        found = [found]
    return found


@pytest.mark.parametrize(
    "result",
    [threading.Lock(), ctypes.pointer(ctypes.c_int(1)), deep(100_000)],
    ids=["TypeError", "ValueError", "RecursionError"],
)
def test_a_result_that_cannot_be_pickled_is_an_error_for_who_waits(ends: tuple[Channel, Channel], result: Any) -> None:
    wire.send_answer(ends[0].send, (True, result, None))

    succeeded, error, rest = ends[1].receive()

    assert (succeeded, type(error), rest) == (False, ModelError, None)
    assert "cannot leave its process" in error.message


def test_connecting_ends_when_the_time_is_up(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        with closing(wire.connect(path, WAIT_S, timeout_s=WAIT_S)), pytest.raises(BlockingIOError):
            wire.connect(path, WAIT_S, timeout_s=0.05)


def test_waiting_ends_when_the_other_end_goes_or_the_time_is_up(ends: tuple[Channel, Channel]) -> None:
    ends[0].set_patience(0.01)
    with pytest.raises(TimeoutError):
        ends[0].receive()

    ends[1].close()

    with pytest.raises(EOFError):
        ends[0].receive()


def test_news_are_a_message_or_the_end(ends: tuple[Channel, Channel]) -> None:
    assert not ends[0].wait_for_news(0)

    ends[1].send("message")
    assert ends[0].wait_for_news(0)
    assert ends[0].receive() == "message"
    assert not ends[0].wait_for_news(0)

    ends[1].close()
    assert ends[0].wait_for_news(0)


def test_an_answer_that_stalls_half_way_counts_as_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "STALL_TIMEOUT_S", 1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        channel = wire.connect(str(tmp_path / "socket"), 0.1, WAIT_S)
        frozen, _ = listener.accept()
        with frozen:
            frozen.sendall(b"half a he")

            with pytest.raises(EOFError):
                channel.receive()
        channel.close()


def test_answer_is_sent_while_another_thread_still_imports_torch(
    ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))

    wire.send_answer(ends[0].send, (True, {"state": "loading"}))

    assert ends[1].receive() == (True, {"state": "loading"})


def test_what_was_read_is_told_before_it_is_received(ends: tuple[Channel, Channel]) -> None:
    sender, receiver = ends
    told = []
    for message in ("first", "second"):
        sender.send(message)

    receiver.read_some()
    for _ in range(2):
        told.append((receiver.has_begun_message, receiver.has_whole_message, receiver.receive()))

    assert told == [(True, True, "first"), (True, True, "second")]
    assert not receiver.has_begun_message
    assert not receiver.has_whole_message


@pytest.mark.parametrize("n_bytes", [5, 14, 30, 40], ids=["header", "lengths", "pickle", "array"])
def test_a_message_is_whole_when_its_last_byte_has_come(ends: tuple[Channel, Channel], n_bytes: int) -> None:
    sender, receiver = ends
    array = np.arange(20, dtype=np.uint8)
    parts, _ = wire._pickle({"x": array})
    data = b"".join(parts)
    n_bytes = len(data) - 5 if n_bytes == 40 else n_bytes

    sender._socket.sendall(data[:n_bytes])
    receiver.read_some()
    told = receiver.has_begun_message, receiver.has_whole_message
    sender._socket.sendall(data[n_bytes:])
    receiver.read_some()

    assert told == (True, False)
    assert receiver.has_whole_message
    assert receiver.receive()["x"].tolist() == array.tolist()


def test_the_end_of_a_connection_is_read(ends: tuple[Channel, Channel]) -> None:
    ends[0].close()

    with pytest.raises(EOFError):
        ends[1].read_some()


@pytest.mark.parametrize(
    "message",
    [b"x" * 100_000, {"image": Image.new("RGB", (3, 2))}],
    ids=["100 KB", "a picture, whose memory is looked for"],
)
def test_what_may_have_to_wait_is_sent_later(ends: tuple[Channel, Channel], message: Any) -> None:
    assert ends[0].send_if_small("small") is None

    send = ends[0].send_if_small(message)

    assert send is not None
    assert ends[1].receive() == "small"
    assert not ends[1].wait_for_news(0)
    send()
    assert ends[1].receive() == message
