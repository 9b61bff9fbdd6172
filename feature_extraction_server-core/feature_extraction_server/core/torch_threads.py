"""How many threads torch computes with: models that are at work at the same time share the cores.

Each thread that calls torch has as many helpers as there are cores. Those of two models would wait for each other in
turn, at every step of a computation, which takes several times as long as if each had its half.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from feature_extraction_server.core.cores import N_CORES

_lock: Final = threading.Lock()
_n_at_work = 0


def share() -> int:
    """Return how many threads one of the models at work should use; OMP_NUM_THREADS is what all of them have."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    n_threads = int(given) if given.isdecimal() and int(given) else N_CORES
    return max(1, n_threads // max(1, _n_at_work))


@contextmanager
def at_work() -> Iterator[None]:
    """Count the calling thread's model as at work meanwhile, and have torch use its share on this thread."""
    global _n_at_work
    with _lock:
        _n_at_work += 1
    try:
        use(share())
        yield
    finally:
        with _lock:
            _n_at_work -= 1


def use(n_threads: int) -> None:
    """Have torch use this many threads for what the calling thread computes, where torch is loaded."""
    torch = sys.modules.get("torch")
    with suppress(AttributeError):  # nobody has it, or another thread is still importing it
        if torch.get_num_threads() != n_threads:  # type: ignore[union-attr]
            torch.set_num_threads(n_threads)  # type: ignore[union-attr]
