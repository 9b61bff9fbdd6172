"""Pictures on their way to another process: their pixels lie in memory that both processes have mapped.

To send the pixels through a socket would copy them four times, which takes half as long as to decode a JPEG. Here the
sender copies them from Pillow's own memory into a *region*, and the receiver from there into a picture of its own. A
region is used again and again: memory that the system hands out anew costs more than the copies.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, SupportsIndex, TypeAlias
from weakref import WeakValueDictionary

from PIL import Image

from feature_extraction_server.core.cores import N_CORES

#: A picture's mode (None: RGB in the layout of a region), its width and height, and its pixels.
Packed: TypeAlias = tuple[str | None, tuple[int, int], Any]
_BYTES_A_PIXEL: Final = 4  # as Pillow keeps RGB: red, green, blue, and one that means nothing
_LAYOUT: Final = "RGBX"
_MIN_BYTES: Final = 4 << 20
#: Larger regions are given back at once.
MAX_KEPT_BYTES: Final = 64 << 20
#: Copies are bound by the memory: more at a time than cores would not be faster, and need a region each.
_copying: Final = threading.BoundedSemaphore(N_CORES)
_free_regions: list[Region] = []  # append and pop are atomic
#: Mapped regions, each for as long as somebody holds it: to map one anew costs a page fault for every few of its pages.
_mapped: WeakValueDictionary[tuple[int, int], mmap.mmap] = WeakValueDictionary()


class Region:
    """Memory without a name. Who is handed the file descriptor can map it, too."""

    def __init__(self, n_bytes: int) -> None:
        self.file_descriptor = _nameless_file()
        os.ftruncate(self.file_descriptor, n_bytes)
        self._memory = mmap.mmap(self.file_descriptor, n_bytes)

    def __len__(self) -> int:
        return len(self._memory)

    def write(self, picture: Image.Image) -> None:
        """Copy the pixels of an RGB picture to the region's start."""
        owner, pixels = _view(picture)
        self._memory[: len(pixels)] = pixels
        del owner

    def close(self) -> None:
        self._memory.close()
        os.close(self.file_descriptor)


def n_bytes(size: tuple[int, int]) -> int:
    """Return how much room the pixels of a picture of this width and height take."""
    return _BYTES_A_PIXEL * size[0] * size[1]


@contextmanager
def region(n_bytes_needed: int) -> Iterator[Region]:
    """Lend a region of at least this size. Waits until fewer than one a core are lent."""
    with _copying:
        lent = _free_regions.pop() if _free_regions else None
        if lent is None or len(lent) < n_bytes_needed:
            if lent is not None:
                lent.close()
            lent = Region(max(_MIN_BYTES, 1 << (n_bytes_needed - 1).bit_length()))
        try:
            yield lent
        except BaseException:
            lent.close()  # the other process may still be reading
            raise
        if len(lent) <= MAX_KEPT_BYTES:
            _free_regions.append(lent)
        else:
            lent.close()


def map_region(file_descriptor: int) -> mmap.mmap:
    """Return the memory behind a region's file descriptor, which is closed."""
    try:
        found = os.fstat(file_descriptor)
        key = found.st_dev, found.st_ino  # not given to another file as long as it is mapped
        memory = _mapped.get(key)
        if memory is None:
            memory = _mapped[key] = mmap.mmap(file_descriptor, found.st_size, access=mmap.ACCESS_READ)
        return memory
    finally:
        os.close(file_descriptor)


def read(memory: mmap.mmap, size: tuple[int, int]) -> Image.Image:
    """Return a copy of the picture at a region's start."""
    with memoryview(memory) as view, view[: n_bytes(size)] as pixels:
        return Image.frombytes("RGB", size, pixels, "raw", _LAYOUT)


def pack(picture: Image.Image) -> Packed:
    """Return an RGB picture's size and its pixels, of which pickle's protocol 5 can make a buffer; others as they are.

    For those who send pictures by other ways than a region; ``unpack`` makes the picture of it again.
    """
    if picture.mode != "RGB":
        return picture.mode, picture.size, picture.tobytes()
    owner, pixels = _view(picture)
    return None, picture.size, _Owned(owner, pixels)


def unpack(packed: Packed) -> Image.Image:
    """Return the picture that ``pack`` was given."""
    mode, size, pixels = packed
    if mode is not None:
        return Image.frombytes(mode, size, pixels)
    return Image.frombytes("RGB", size, pixels, "raw", _LAYOUT)


class _Owned:
    """Pixels that a buffer is made of, and what keeps them alive until that is done."""

    def __init__(self, owner: Any, pixels: Any) -> None:
        self._owner = owner
        self._pixels = pixels

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _as_it_is, (pickle.PickleBuffer(self._pixels),)


def _as_it_is(pixels: Any) -> Any:
    return pixels


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("feature_extraction_server-pixels")
    with tempfile.TemporaryFile() as file:  # on other systems than Linux
        return os.dup(file.fileno())


class _ArrowArray(ctypes.Structure):
    """https://arrow.apache.org/docs/format/CDataInterface.html"""


_ArrowArray._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
]
_pointer_of: Final = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype = ctypes.c_void_p
_pointer_of.argtypes = (ctypes.py_object, ctypes.c_char_p)


def _view(picture: Image.Image) -> tuple[Any, Any]:
    """Return the picture's pixels, without a copy where it lies in one piece, and what keeps them alive."""
    try:
        _, capsule = picture.__arrow_c_array__()
    except ValueError:  # larger than Pillow's blocks (16 MiB), it lies in several
        pixels = picture.tobytes("raw", _LAYOUT)
        return pixels, pixels
    array = _ArrowArray.from_address(_pointer_of(capsule, b"arrow_array"))
    address = array.children[0].contents.buffers[1]  # an array of pixels: its child has the bytes
    return capsule, memoryview((ctypes.c_ubyte * n_bytes(picture.size)).from_address(address)).cast("B")
