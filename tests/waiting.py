"""Threads and waits of tests, each with an end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

#: Only to end what hangs: several times what anything takes on a slow machine.
TIMEOUT_S = 120.0


def wait_until(condition: Callable[[], bool], what: str = "the condition") -> None:
    """Return as soon as ``condition()`` holds; fail when it takes too long.

    The longer it takes, the less often it looks: to ask a server takes the time of the processes that are waited for.
    """
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        assert waited < TIMEOUT_S, f"waited in vain for {what}"
        time.sleep(min(0.005 + waited / 40, 0.1))


def at_once(n: int, call: Callable[[int], T]) -> list[T]:
    """Return ``call(0)`` to ``call(n - 1)``, all of them begun at the same moment in threads of their own."""
    barrier = threading.Barrier(n)

    def begin(index: int) -> T:
        barrier.wait(TIMEOUT_S)
        return call(index)

    with ThreadPoolExecutor(n) as pool:
        return [future.result(TIMEOUT_S) for future in [pool.submit(begin, index) for index in range(n)]]
