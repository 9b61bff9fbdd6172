"""How many threads torch computes with: models that are at work at the same time share the cores.

Each thread that calls torch has as many helpers as there are cores. Those of two models would wait for each other in
turn, at every step of a computation, which takes several times as long as if each had its half.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Final, TypeVar

from feature_extraction_server.core.cores import N_CORES

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")

_lock: Final = threading.Lock()
_n_at_work = 0
_taken: int | None = None


def share() -> int:
    """Return how many threads one of the models at work should use; OMP_NUM_THREADS is what all of them have."""
    if _taken is not None:
        return _taken
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


def take_share(n_threads: int) -> None:
    """Compute on the calling thread with this many threads, which are this process's share until the next call.

    For a process with one model, which does not see the others that are at work.
    """
    global _taken
    _taken = n_threads
    use(n_threads)


def use(n_threads: int) -> None:
    """Have torch use this many threads for what the calling thread computes, where torch is loaded."""
    torch = sys.modules.get("torch")
    with suppress(AttributeError):  # nobody has it, or another thread is still importing it
        if torch.get_num_threads() != n_threads:  # type: ignore[union-attr]
            torch.set_num_threads(n_threads)  # type: ignore[union-attr]


def split(items: Sequence[_Part]) -> list[Sequence[_Part]]:
    """Return a batch's items in even parts, one a core, or all in one where some of the cores would have to wait."""
    n_cores = share()
    if len(items) % n_cores and len(items) < 4 * n_cores:
        return [items]
    size = -(-len(items) // n_cores)
    return [items[start : start + size] for start in range(0, len(items), size)]


def in_parallel(
    function: Callable[[_Part], _Result], parts: Sequence[_Part], most_at_once: int | None = None
) -> list[_Result]:
    """Return what a function makes of each part, in order, where each core computes one part after the other.

    For models on the CPU. Cores that compute one part together wait for each other at each of its steps, the small ones
    included, and all the longer when one of them has something else to do meanwhile.

    Args:
        function: computes with torch, under a ``torch.inference_mode()`` of its own, or with another library on few
            threads; called by several threads at once.
        parts: about equally much to do, or the longest first.
        most_at_once: how many parts are computed at the same time at most, for the memory's sake.

    Raises:
        Exception: what the function raises.
    """
    n_threads = min(share(), len(parts), most_at_once or len(parts))
    if n_threads < 2:
        return [function(part) for part in parts]
    with ThreadPoolExecutor(n_threads, "torch", initializer=use, initargs=(1,)) as pool:
        return list(pool.map(function, parts))
