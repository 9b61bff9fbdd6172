"""One connection of a web worker to the engine, in this process: that each question has the answer that is its own."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.engine_connections import Connection
from feature_extraction_server.core.errors import DeadlineExceeded, ModelUnavailable, QueueFull
from feature_extraction_server.core.jobs import Call, Job
from feature_extraction_server.core.wire import Channel

WAIT_S = 20


class Worker:
    """A web worker's end of a connection; what the engine's end gets is done at once, as by its reading thread."""

    def __init__(self, engine: Engine) -> None:
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours)
        self.channel.set_patience(WAIT_S)
        self.connection = Connection(theirs, engine, threading.Event())

    def ask(self, *message: Any) -> None:
        self.channel.send((None, False, *message))
        self.connection.take(self.connection.channel.receive())

    def call(self, text: str, timeout_s: float = WAIT_S) -> None:
        self.ask("call", "fake_echo", tuple(Call("echo", {"x": [text]}, ("x",))), False, time.monotonic() + timeout_s)

    def answer(self) -> Any:
        succeeded, answer, *_ = self.channel.receive()
        return answer if succeeded else type(answer)

    def close(self) -> None:
        self.connection.close()
        self.channel.close()


@pytest.fixture
def worker(engine: Engine) -> Iterator[Worker]:
    worker = Worker(engine)
    yield worker
    worker.close()


class Submits:
    """Stands for ``Engine.submit``: each call of it waits until the test ends it."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.begun = threading.Semaphore(0)
        self.ended: list[threading.Event] = [threading.Event(), threading.Event()]
        self.threads: list[threading.Thread] = []
        self.error: Exception = ModelUnavailable("no room")

    def __call__(self, name: str, job: Job, deadline: float) -> None:
        n = len(self.jobs)
        self.jobs.append(job)
        self.threads.append(threading.current_thread())
        self.begun.release()
        assert self.ended[n].wait(WAIT_S)
        raise self.error

    def wait_for_begin(self) -> None:
        assert self.begun.acquire(timeout=WAIT_S)

    def end(self, n: int) -> None:
        """End a call of it with its error, and wait until all that follows is done."""
        self.ended[n].set()
        self.threads[n].join(WAIT_S)
        assert not self.threads[n].is_alive()


@pytest.fixture
def submits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Submits]:
    submits = Submits()
    monkeypatch.setattr(engine, "submit", submits)
    yield submits
    for n in range(len(submits.threads)):
        submits.end(n)


@pytest.mark.parametrize(
    "error",
    [ModelUnavailable("no room"), QueueFull("full"), ValueError("a fault")],
    ids=lambda error: type(error).__name__,
)
def test_a_call_that_fails_after_its_deadline_has_one_answer(
    worker: Worker, submits: Submits, error: Exception
) -> None:
    submits.error = error
    worker.call("late", timeout_s=-1)
    submits.wait_for_begin()
    worker.connection.end_overdue_call()

    submits.end(0)
    worker.ask("status", "fake_echo")

    assert worker.answer() is DeadlineExceeded
    assert worker.answer()["model"] == "fake_echo"


def test_a_call_that_fails_after_its_deadline_does_not_take_the_next_one_along(
    worker: Worker, submits: Submits
) -> None:
    worker.call("late", timeout_s=-1)
    submits.wait_for_begin()
    worker.connection.end_overdue_call()
    worker.call("next")
    submits.wait_for_begin()

    submits.end(0)
    submits.jobs[1].succeed(0, ["done"])

    assert worker.answer() is DeadlineExceeded
    assert worker.answer() == ["done"]


def test_a_call_that_fails_in_time_is_answered_with_that(worker: Worker, submits: Submits) -> None:
    worker.call("first")
    submits.wait_for_begin()

    submits.end(0)
    worker.connection.end_overdue_call()
    worker.ask("status", "fake_echo")

    assert worker.answer() is ModelUnavailable
    assert worker.answer()["model"] == "fake_echo"
