"""Which web worker should take the next connection, by how many each has."""

import os
import subprocess
import sys

import pytest

from feature_extraction_server.flask import connection_counts
from feature_extraction_server.flask.connection_counts import NO_MORE, ConnectionCount


@pytest.fixture(autouse=True)
def _unused_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_counts, "_shared", memoryview(bytearray(8 * 4)).cast("i"))


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [(5, [5], False), (5, [4], False), (5, [3], True), (5, [9, 3], True), (5, [9, 7, 6], False), (0, [0], False)],
)
def test_a_worker_is_ahead_of_one_that_has_fewer_by_more_than_one(own: int, others: list[int], expected: bool) -> None:
    count, *rest = [ConnectionCount() for _ in [own, *others]]
    count.tell(own)
    for other, n in zip(rest, others, strict=True):
        other.tell(n)

    assert count.is_ahead() is expected


def test_one_that_takes_no_more_or_has_not_begun_counts_for_nothing() -> None:
    count, stopping, starting = ConnectionCount(), ConnectionCount(), ConnectionCount()
    count.tell(9)
    stopping.tell(0)
    assert count.is_ahead()

    stopping.tell(NO_MORE)

    assert not count.is_ahead()
    starting.tell(0)
    assert count.is_ahead()


def test_a_dead_one_counts_for_nothing_and_its_place_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    count, dead = ConnectionCount(), ConnectionCount()
    count.tell(9)
    with monkeypatch.context() as in_its_process:
        in_its_process.setattr(os, "getpid", lambda: ended.pid)
        dead.tell(0)
    assert not count.is_ahead()

    ConnectionCount().tell(3)

    assert count.is_ahead()
    assert connection_counts._shared.tolist() == [os.getpid(), 9, os.getpid(), 3, 0, 0, 0, 0]


def test_one_whose_number_somebody_else_s_process_has_by_now_counts_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count, dead = ConnectionCount(), ConnectionCount()
    count.tell(9)
    dead.tell(0)
    assert count.is_ahead()

    def kill(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)

    assert not count.is_ahead()


def test_those_that_find_no_place_are_never_ahead() -> None:
    *_, last = [ConnectionCount() for _ in range(5)]

    last.tell(9)

    assert not last.is_ahead()
    assert connection_counts._shared.tolist() == [os.getpid(), NO_MORE] * 4
