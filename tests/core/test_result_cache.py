"""The store of answers: how much it keeps, and what goes first."""

from __future__ import annotations

import tracemalloc

import pytest

from feature_extraction_server.core.result_cache import ENTRY_BYTES, ResultCache, is_random
from tests.waiting import at_once

ANSWER = b"x" * 100
SIZE = len(ANSWER) + ENTRY_BYTES


def key(number: int) -> bytes:
    return b"%048d" % number


def test_answer_is_found_by_its_key_and_counted() -> None:
    cache = ResultCache(10 * SIZE)
    cache.keep("one", key(1), ANSWER)

    assert cache.look_up("one", [key(1), key(2), key(1)]) == [ANSWER, None, ANSWER]
    assert cache.told("one") == {"hits": 2, "misses": 1, "bytes": SIZE, "entries": 1}
    assert cache.told("two") == {"hits": 0, "misses": 0, "bytes": 0, "entries": 0}


def test_what_was_not_asked_for_longest_makes_room() -> None:
    cache = ResultCache(2 * SIZE)
    cache.keep("one", key(1), ANSWER)
    cache.keep("two", key(2), ANSWER)
    cache.look_up("one", [key(1)])

    cache.keep("one", key(3), ANSWER)

    assert cache.look_up("one", [key(1), key(2), key(3)]) == [ANSWER, None, ANSWER]
    assert cache.told("two")["entries"] == cache.told("two")["bytes"] == 0


def test_answer_larger_than_all_the_room_is_not_kept_and_drops_nothing() -> None:
    cache = ResultCache(2 * SIZE)
    cache.keep("one", key(1), ANSWER)

    cache.keep("one", key(2), b"x" * 2 * SIZE)

    assert cache.look_up("one", [key(1), key(2)]) == [ANSWER, None]


def test_answer_that_is_kept_again_takes_its_room_once() -> None:
    cache = ResultCache(10 * SIZE)

    for answer in (ANSWER, b"y", ANSWER):
        cache.keep("one", key(1), answer)

    assert cache.told("one")["bytes"] == SIZE
    assert cache.told("one")["entries"] == 1


def test_room_is_bounded_while_many_threads_keep_and_look_up() -> None:
    cache = ResultCache(20 * SIZE)

    def work(number: int) -> None:
        for n in range(200):
            cache.keep("one", key(200 * number + n), ANSWER)
            cache.look_up("one", [key(200 * number + n)])

    at_once(8, work)

    assert cache.told("one")["entries"] == 20
    assert cache.told("one")["bytes"] == 20 * SIZE
    assert sum(cache.told("one")[name] for name in ("hits", "misses")) == 1600


def test_memory_that_is_taken_is_not_more_than_what_is_counted() -> None:
    cache = ResultCache(1 << 30)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]

    for number in range(5000):
        cache.keep("one", key(number), bytes(100))

    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert taken <= cache.told("one")["bytes"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param({"do_sample": True, "top_k": 3}, True, id="sampling"),
        pytest.param({"temperature": 0.7}, True, id="temperature"),
        pytest.param({"do_sample": False}, False, id="no sampling"),
        pytest.param({"temperature": 0}, False, id="temperature 0"),
        pytest.param({"num_beams": 2}, False, id="beams"),
        pytest.param(None, False, id="null"),
        pytest.param("do_sample", False, id="no config at all"),
    ],
)
def test_answers_are_random_where_they_are_sampled(config: object, expected: bool) -> None:
    assert is_random(config) is expected
