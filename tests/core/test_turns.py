"""Work that takes turns: who begins when, and who waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from feature_extraction_server.core import turns as module
from feature_extraction_server.core.turns import Turns, waiting
from tests.waiting import TIMEOUT_S, wait_until


class Work:
    """Work that says when it has begun, and lasts until the test ends it; ``waits`` gives its turn back meanwhile."""

    def __init__(self, order: list[str], name: str, *, waits: bool = False) -> None:
        self._order = order
        self._name = name
        self._waits = waits
        self.begun = threading.Event()
        self.answer = threading.Event()  # ends the wait
        self.resumed = threading.Event()
        self.end = threading.Event()
        self.ended = threading.Event()

    def __call__(self) -> None:
        self._order.append(self._name)
        self.begun.set()
        if self._waits:
            with waiting():
                self.answer.wait(TIMEOUT_S)
            self.resumed.set()
        self.end.wait(TIMEOUT_S)
        self.ended.set()

    def has_begun(self) -> bool:
        return self.begun.wait(TIMEOUT_S)


@pytest.fixture
def make(order: list[str]) -> Iterator[Callable[..., Work]]:
    """``make(name)`` makes a ``Work``; all of it ends with the test."""
    made: list[Work] = []

    def work(name: str, *, waits: bool = False) -> Work:
        made.append(Work(order, name, waits=waits))
        return made[-1]

    yield work
    for one in made:
        one.answer.set()
        one.end.set()


@pytest.fixture
def order() -> list[str]:
    """The names of what has begun, in that order."""
    return []


@pytest.fixture
def turns() -> Iterator[Turns]:
    """Two turns at a time, and more threads than any test needs."""
    made = Turns(2, 16)
    yield made
    made.shutdown()


def test_work_begins_in_its_order_and_so_much_of_it_at_a_time(
    turns: Turns, make: Callable[..., Work], order: list[str]
) -> None:
    works = [make(name) for name in "abcd"]
    for work in works:
        turns.submit(work)
    assert works[0].has_begun()
    assert works[1].has_begun()
    assert not turns.is_free
    assert sorted(order) == ["a", "b"]

    works[1].end.set()
    assert works[2].has_begun()
    works[0].end.set()
    assert works[3].has_begun()

    assert order[2:] == ["c", "d"]


def test_urgent_work_begins_though_all_turns_are_taken(
    turns: Turns, make: Callable[..., Work], order: list[str]
) -> None:
    for name in "abc":
        turns.submit(make(name))
    urgent = make("urgent")

    turns.submit(urgent, urgent=True)

    assert urgent.has_begun()
    assert "c" not in order


def test_who_waits_gives_back_the_turn(turns: Turns, make: Callable[..., Work]) -> None:
    waiters, others = [make(name, waits=True) for name in "ab"], [make(name) for name in "cd"]
    for work in (*waiters, *others):
        turns.submit(work)

    assert all(work.has_begun() for work in others)


def test_what_has_begun_goes_before_what_has_not(turns: Turns, make: Callable[..., Work], order: list[str]) -> None:
    waiters, others, late = [make(name, waits=True) for name in "ab"], [make(name) for name in "cd"], make("late")
    for work in (*waiters, *others):
        turns.submit(work)
    assert all(work.has_begun() for work in others)
    turns.submit(late)

    for work in waiters:  # now four have a turn
        work.answer.set()
        assert work.resumed.wait(TIMEOUT_S)
    for work in others:  # two still have
        work.end.set()
        assert work.ended.wait(TIMEOUT_S)
    assert "late" not in order
    waiters[0].end.set()

    assert late.has_begun()


def test_long_work_keeps_others_waiting_for_one_turn_only(
    turns: Turns, make: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    works = [make(name) for name in "abcd"]
    for work in works:
        turns.submit(work)
    assert turns.end_long_turns() is not None
    assert not works[2].begun.is_set()

    monkeypatch.setattr(module, "TURN_S", 0.0)
    turns.end_long_turns()

    assert all(work.has_begun() for work in works)
    assert turns.end_long_turns() is None


def test_nothing_but_what_is_urgent_begins_while_it_is_held(
    turns: Turns, make: Callable[..., Work], order: list[str]
) -> None:
    work, urgent = make("a"), make("urgent")

    with turns.held():
        turns.submit(work)
        turns.submit(urgent, urgent=True)
        assert urgent.has_begun()
        assert order == ["urgent"]

    assert work.has_begun()


def test_work_waits_for_a_thread_where_there_are_no_more(make: Callable[..., Work], order: list[str]) -> None:
    turns = Turns(2, 1)
    first, second = make("a"), make("b")

    turns.submit(first)
    turns.submit(second, urgent=True)
    assert first.has_begun()
    assert order == ["a"]
    first.end.set()

    assert second.has_begun()
    turns.shutdown()


@contextmanager
def no_thread_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The system starts no threads meanwhile, as where a container has as many as it may have."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(module._Thread, "start", start)
        yield


def test_threads_that_there_are_do_what_came_when_the_system_had_none_left(
    turns: Turns, make: Callable[..., Work], order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third, urgent = make("a"), make("b"), make("c"), make("urgent")
    turns.submit(first)
    assert first.has_begun()

    with no_thread_left(monkeypatch):
        for work in (second, third):
            turns.submit(work)
        turns.submit(urgent, urgent=True)
        for work in (first, second, urgent):
            work.end.set()

        assert third.has_begun()
    assert sorted(order) == ["a", "b", "c", "urgent"]


@pytest.mark.parametrize("urgent", [True, False], ids=["urgent", "patient"])
def test_what_came_when_there_was_not_one_thread_is_done_when_there_is(
    turns: Turns, make: Callable[..., Work], monkeypatch: pytest.MonkeyPatch, urgent: bool
) -> None:
    work = make("a")

    with no_thread_left(monkeypatch):
        turns.submit(work, urgent=urgent)
        assert turns.end_long_turns() is not None
    turns.end_long_turns()

    assert work.has_begun()


def test_threads_are_used_again_and_end_with_the_shutdown(make: Callable[..., Work]) -> None:
    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("request")}

    before = threads()
    turns = Turns(2, 16)
    for name in "abc":
        work = make(name)
        work.end.set()
        turns.submit(work)
        assert work.ended.wait(TIMEOUT_S)
    assert len(threads() - before) <= 2

    turns.shutdown()

    wait_until(lambda: threads() <= before)


def test_shutdown_while_another_thread_has_the_lock_ends_all_threads(make: Callable[..., Work]) -> None:
    turns = Turns(2, 16)
    busy, done = make("busy"), make("done")
    turns.submit(busy)
    turns.submit(done)
    assert busy.has_begun()
    done.end.set()
    wait_until(lambda: len(turns._idle) == 1)
    threads = [*turns._idle, *turns._at_turn]

    with turns._lock:
        turns.shutdown()
    busy.end.set()

    wait_until(lambda: not any(thread.is_alive() for thread in threads))


class ShutsDown:
    """A lock: whenever a thread that runs work is about to give it back, there is a shutdown."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._lock = turns._lock
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        if threading.current_thread().name == "request":
            self._turns.shutdown()
        self._lock.release()


def test_shutdown_while_a_thread_becomes_idle_ends_it(
    make: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = Turns(2, 16)
    work = make("a")
    turns.submit(work)
    (thread,) = turns._at_turn
    monkeypatch.setattr(turns, "_lock", ShutsDown(turns))

    work.end.set()

    wait_until(lambda: not thread.is_alive())


def test_waiting_does_nothing_on_a_thread_without_a_turn() -> None:
    with waiting():
        pass
