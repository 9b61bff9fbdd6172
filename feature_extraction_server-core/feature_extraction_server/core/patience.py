"""How often a request that waits for its result looks whether anybody still wants that.

Each look wakes a thread, which takes Python's interpreter lock from one that has something to do. Were it ten times a
second for each of a thousand requests, a process would do little else. So the more wait, the less often each looks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

#: Where many wait, all requests of this process together take from 1 to 2 times as many looks a second.
LOOKS_PER_S: Final = 500

_lock: Final = threading.Lock()
_n_waiting = 0


@contextmanager
def counted() -> Iterator[None]:
    """Count the calling thread's request as one that waits. Also a decorator of what waits."""
    global _n_waiting
    with _lock:
        _n_waiting += 1
    try:
        yield
    finally:
        with _lock:
            _n_waiting -= 1


def look_interval_s(shortest_s: float) -> float:
    """Return how long to wait until the next look: ``shortest_s``, or 2, 4, 8, ... times that where many wait."""
    times = int(_n_waiting / (LOOKS_PER_S * shortest_s))
    return shortest_s * (1 << max(0, times.bit_length() - 1))
