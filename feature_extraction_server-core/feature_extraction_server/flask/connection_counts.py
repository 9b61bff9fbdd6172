"""How many connections each of a server's web workers has, in memory that all of them share.

A new connection goes to whichever worker is awake first. Those of a client that makes many at once may then all come to
one, which keeps to one core, for as long as they stay open. With this, a worker that has more than another leaves it a
moment to take the new one.
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from typing import Final

#: Two numbers for each worker: its process, and how many connections it has.
_N_WORKERS: Final = 256
#: The count of one that takes no more.
NO_MORE: Final = (1 << 31) - 1
_shared: Final = memoryview(mmap.mmap(-1, 8 * _N_WORKERS)).cast("i")


class ConnectionCount:
    """One worker's count. Made by gunicorn's master, which is the parent of all that share the memory."""

    def __init__(self) -> None:
        self._slot: int | None = None
        for slot in range(0, len(_shared), 2):
            if not _is_alive(_shared[slot]):
                self._slot = slot
                _shared[slot], _shared[slot + 1] = os.getpid(), NO_MORE
                return

    def tell(self, n_connections: int) -> None:
        """Say how many this process has now."""
        if self._slot is not None:
            _shared[self._slot], _shared[self._slot + 1] = os.getpid(), n_connections

    def is_ahead(self) -> bool:
        """Tell whether another worker has so few connections that it should take the next one."""
        if self._slot is None:
            return False
        own = _shared[self._slot + 1]
        for slot in range(0, len(_shared), 2):
            if not _shared[slot]:  # nor is there any behind it
                return False
            if _shared[slot + 1] + 1 < own and _is_alive(_shared[slot]):
                return True
        return False


def _is_alive(pid: int) -> bool:
    if not pid:
        return False
    with suppress(OSError):  # there is none of that number, or it is somebody else's by now
        os.kill(pid, 0)
        return True
    return False
