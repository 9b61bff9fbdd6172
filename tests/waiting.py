"""Threads and waits of tests, each with an end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

TIMEOUT_S = 60.0


def wait_until(condition: Callable[[], bool], what: str = "the condition") -> None:
    """Return as soon as ``condition()`` holds; fail when it takes too long."""
    give_up_at = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up_at, f"waited in vain for {what}"
        time.sleep(0.005)


def at_once(n: int, call: Callable[[int], T]) -> list[T]:
    """Return ``call(0)`` to ``call(n - 1)``, all of them begun at the same moment in threads of their own."""
    barrier = threading.Barrier(n)

    def begin(index: int) -> T:
        barrier.wait(TIMEOUT_S)
        return call(index)

    with ThreadPoolExecutor(n) as pool:
        return [future.result(TIMEOUT_S) for future in [pool.submit(begin, index) for index in range(n)]]
