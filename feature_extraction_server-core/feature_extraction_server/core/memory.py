"""How a process deals with memory that it has freed."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from contextlib import suppress
from typing import Final

from PIL import Image

from feature_extraction_server.core.cores import N_CORES

# Of malloc.h, in GNU's C library.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8


def keep_freed_memory() -> None:
    """Have Pillow and the C library keep what is freed, up to a bound, for what is allocated next.

    A request's body, its decoded text and its pictures are allocated and freed every time. By default, they
    give such blocks back to the system at once and get them anew, page by page, which takes longer than to decode a
    picture. Who has set one of the C library's own variables (MALLOC_...) has decided otherwise.
    """
    Image.core.set_blocks_max(2 * N_CORES)  # type: ignore[attr-defined]  # of at most 16 MiB
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        library.mallopt(_M_TRIM_THRESHOLD, 64 << 20)
        # Each arena keeps as much; under Python's interpreter lock, few are needed.
        library.mallopt(_M_ARENA_MAX, max(2, N_CORES))


def give_back_memory() -> None:
    """Give freed memory back to the device and to the operating system."""
    gc.collect()
    torch = sys.modules.get("torch")
    with suppress(AttributeError):  # nobody has it, or another thread is still importing it
        if torch.cuda.is_available():  # type: ignore[union-attr]
            torch.cuda.empty_cache()  # type: ignore[union-attr]
    Image.core.clear_cache()  # type: ignore[attr-defined]
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
