"""How far the start of a model has come: what is left to download.

What loads a model tells it to ``report``, which whoever runs ``load_model`` has set. A report may go to another
process: the bytes are counted where they arrive, on the disk, by whoever asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Download:
    """Files that are on their way into the Hugging Face hub's cache.

    Args:
        folder: where the cache has them while they come, and afterwards.
        sizes: how many bytes each has, by its name there; while one comes, its name is longer.
    """

    folder: Path
    sizes: Mapping[str, int]

    def told(self) -> dict[str, Any]:
        """Return the stage, and how many of how many bytes are there, as a model's status tells it."""
        return {
            "stage": "downloading",
            "bytes_done": sum(self._n_there(name, size) for name, size in self.sizes.items()),
            "bytes_total": sum(self.sizes.values()),
        }

    def _n_there(self, name: str, size: int) -> int:
        n_there = 0
        for path in self.folder.glob(f"{name}*"):  # an attempt that was broken off may have left one
            with suppress(OSError):  # it has just been given its final name
                status = path.stat()
                # What is not yet written of a file may count in its length, but has no blocks.
                n_there = max(n_there, min(status.st_size, status.st_blocks * 512, size))
        return n_there


def _nobody(download: Download | None) -> None:
    """Nobody asked how far a start has come."""


#: What takes the news of the start that this thread is at: what is being downloaded, then None.
report: ContextVar[Callable[[Download | None], None]] = ContextVar("report", default=_nobody)
