"""Which of the machine's cores a web worker runs on.

Python runs one thread of a process at a time. Where the system spreads a busy worker's threads over several cores,
every hand-over between two of them wakes another core, which takes longer than many a thread's turn: a worker with 32
requests under way answers half as many again when it keeps to one core. What runs without that lock (decoding a
picture) and what is started as another process may use all cores.

While it decodes large pictures or recordings, all of its threads may: one that is kept to a core on which another
computes waits there, even where the next core has nothing to do, since what runs is hardly ever moved. Two workers that
decode and a model, on two cores, left a quarter of their time unused.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from feature_extraction_server.core.places import take_place

#: What this process may use; empty where the system does not say.
ALLOWED: Final = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _quota(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Return how many cores' time a container may use (Docker's --cpus, Kubernetes' limits)."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # of cgroups' version 2, and 1
        with suppress(OSError, ValueError):  # there are no such files, or they say "max"
            quota, period = (int(number) for file in files for number in (cgroup / file).read_text().split())
            if quota > 0:
                return quota / period
    return math.inf


#: How many threads can really compute at the same time.
N_CORES: Final = max(1, int(min(len(ALLOWED) or os.cpu_count() or 1, _quota())))
_own: set[int] = set()
#: How long after it last asked for all cores a worker keeps to its own again.
KEEP_AGAIN_AFTER_S = 1.0
_moving: Final = threading.Lock()
_elsewhere: Final[set[int]] = set()  # threads that use all cores whatever the others do
_is_spread = False
_spread_until = 0.0


def keep_to_one_core(directory: Path, first: int) -> None:
    """Keep the calling thread, and those that it will start, to the core that the fewest processes have chosen.

    Args:
        directory: where the processes that share the cores find each other's choices.
        first: where to begin, so that servers on one machine do not all prefer the same core.
    """
    if len(ALLOWED) < 2:
        return
    _own.clear()
    with suppress(OSError):  # a disk that is full, say: it goes without
        _own.add(ALLOWED[(first + take_place(directory, "core")) % len(ALLOWED)])
        _move(0, _own)


@contextmanager
def all_cores() -> Iterator[None]:
    """Let the calling thread, and a process that it starts meanwhile, use every core."""
    if not _own:
        yield
        return
    thread = threading.get_native_id()
    with _moving:
        _elsewhere.add(thread)
        _move(0, ALLOWED)
    try:
        yield
    finally:
        with _moving:
            _elsewhere.remove(thread)
        _move(0, ALLOWED if _is_spread else _own)  # may wait for a core, therefore without the lock


def spread() -> None:
    """Let all threads of this process use every core, until nobody has asked for that for ``KEEP_AGAIN_AFTER_S``."""
    global _is_spread, _spread_until
    if not _own:
        return
    with _moving:
        _spread_until = time.monotonic() + KEEP_AGAIN_AFTER_S
        if _is_spread:
            return
        with suppress(RuntimeError):  # the system has no thread left
            threading.Thread(target=_keep_again, name="cores", daemon=True).start()
            _is_spread = True
            _move_threads(ALLOWED)


def _keep_again() -> None:
    global _is_spread
    while True:
        with _moving:
            left_s = _spread_until - time.monotonic()
            if left_s <= 0:
                _is_spread = False
                _move_threads(_own)
                return
        time.sleep(left_s)


def _move_threads(cores: Collection[int]) -> None:
    for thread in map(int, os.listdir("/proc/self/task")):
        if thread not in _elsewhere:
            _move(thread, cores)


def _move(thread: int, cores: Collection[int]) -> None:
    # A thread may have ended, and a container may have been given other cores than it had at its start.
    with suppress(OSError):
        os.sched_setaffinity(thread, cores)
