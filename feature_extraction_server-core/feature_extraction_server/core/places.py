"""Numbers that the processes of one server share out among themselves: each has the smallest that no other has."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO, Final

_locks: Final[list[IO[bytes]]] = []  # kept open for as long as the process lives


def take_place(directory: Path, name: str) -> int:
    """Return a number that is this process's for as long as it lives, and any other's after that.

    Args:
        directory: where the processes find each other's.
        name: what it is for.

    Raises:
        OSError: the directory is not there, cannot be written to, or lies where files cannot be locked.
    """
    number = 0
    while True:
        file = (directory / f"{name}-{number}").open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            number += 1
        except OSError:
            file.close()
            raise
        else:
            _locks.append(file)
            return number
