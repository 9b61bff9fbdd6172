"""Pictures on their way to another process: their pixels lie in memory that both processes have mapped.

To send the pixels through a socket would copy them four times, which takes half as long as to decode a JPEG. Here a
picture is decoded in such a *region*, or copied there once, and the receiver's picture lies there as well. A region is
used again as soon as neither side has a picture in it: memory that the system hands out anew costs more than a copy.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, Final, SupportsIndex, TypeAlias
from weakref import WeakValueDictionary, finalize, ref

from PIL import Image

#: A picture's mode (None: RGB in the layout of a region), its width and height, and its pixels.
Packed: TypeAlias = tuple[str | None, tuple[int, int], Any]
_BYTES_A_PIXEL: Final = 4  # as Pillow keeps RGB: red, green, blue, and one that means nothing
_LAYOUT: Final = "RGBX"
#: What comes before the pixels: a byte that says whether the receiver has the region, one whether it is used only once.
_HEADER_BYTES: Final = 64
_HANDED_OVER: Final = 0
_USED_ONCE: Final = 1
#: Pages that no picture has reached take no memory.
_MIN_BYTES: Final = 4 << 20
#: What all regions take at most that are kept to be used again.
MAX_KEPT_BYTES: Final = 256 << 20

_kept: list[Region] = []
_choosing: Final = threading.Lock()
#: What is mapped of other processes' regions, as long as somebody holds it: to map it anew costs page faults.
_mapped: WeakValueDictionary[tuple[int, int], mmap.mmap] = WeakValueDictionary()
os.register_at_fork(after_in_child=_kept.clear)  # two processes would write to the same memory


class Region:
    """Memory without a name. Who is handed the file descriptor can map it, too."""

    def __init__(self, n_bytes: int) -> None:
        self.file_descriptor = _nameless_file()
        finalize(self, os.close, self.file_descriptor)
        os.ftruncate(self.file_descriptor, n_bytes)
        self._memory = mmap.mmap(self.file_descriptor, n_bytes)
        self._view: ref[memoryview] | None = None
        self._used_at: float | None = None  # None: it has no pages

    def __len__(self) -> int:
        return len(self._memory)

    @property
    def is_handed_over(self) -> bool:
        """Whether the receiver has a picture in it, or will have."""
        return bool(self._memory[_HANDED_OVER])

    @property
    def is_free(self) -> bool:
        """Whether neither side has a picture in it."""
        return not self.is_handed_over and (self._view is None or self._view() is None)

    def use(self) -> memoryview:
        """Return the memory. The region is not free as long as that, or a picture in it, exists."""
        view = memoryview(self._memory)
        self._view = ref(view)
        self._used_at = time.monotonic()
        return view

    def give_back(self, unused_s: float) -> bool:
        """Give its pages back to the system if it is free and was not used for so long; tell whether it did."""
        if self._used_at is None or time.monotonic() - self._used_at < unused_s or not self.is_free:
            return False
        self._used_at = None
        try:
            self._memory.madvise(mmap.MADV_REMOVE)  # those of the receiver are the same
        except OSError:  # a system that has no such thing for such a file
            return False
        return True

    def hand_over(self) -> None:
        """Note that it is about to be sent. It is free again when the receiver has no picture in it any more."""
        self._memory[_HANDED_OVER] = 1

    def use_only_once(self) -> None:
        """Have the receiver give its memory back as soon as no picture is in it any more."""
        self._memory[_USED_ONCE] = 1


def decode_in_region(picture: Image.Image) -> None:
    """Have an RGB picture that is opened, but not loaded, be decoded in a region, if there is one for it.

    Only for decoders that write every pixel: there are those of another client's picture.

    Raises:
        OSError: the system has no memory or no file descriptor for it.
    """
    chosen = _choose(_HEADER_BYTES + _room(picture.size))
    if chosen is not None:
        region, view = chosen
        picture.im = _picture_core(view, _HEADER_BYTES, picture.size)
        picture.region = region, picture.im  # type: ignore[attr-defined]  # for ``share``


def share(pictures: list[Image.Image]) -> tuple[Region, object]:
    """Return a region that holds RGB pictures, one after the other, and what keeps it in use until it is handed over.

    Raises:
        OSError: the system has no memory or no file descriptor for it.
    """
    if len(pictures) == 1:
        region, core = getattr(pictures[0], "region", (None, None))
        if region is not None and core is pictures[0].im and not region.is_handed_over:
            return region, core
    n_bytes_needed = _HEADER_BYTES + sum(_room(picture.size) for picture in pictures)
    region, view = _choose(n_bytes_needed) or _make_for_once(n_bytes_needed)
    start = _HEADER_BYTES
    for picture in pictures:
        owner, pixels = _view(picture)
        view[start : start + len(pixels)] = pixels
        del owner
        start += _room(picture.size)
    return region, view


def _choose(n_bytes_needed: int) -> tuple[Region, memoryview] | None:
    """Return a kept region of at least this size that is free, and its memory.

    It is made anew where there is none, but not of many at once: each takes file descriptors. None then.
    """
    with _choosing:
        for region in reversed(_kept):  # as few different ones as possible
            if len(region) >= n_bytes_needed and region.is_free:
                return region, region.use()
        n_bytes_new = max(_MIN_BYTES, n_bytes_needed)
        for other in [other for other in _kept if other.is_free]:  # too small
            if sum(map(len, _kept)) + n_bytes_new > MAX_KEPT_BYTES:
                _kept.remove(other)
        if sum(map(len, _kept)) + n_bytes_new > MAX_KEPT_BYTES:
            return None
        _kept.append(Region(n_bytes_new))
        return _kept[-1], _kept[-1].use()


def _make_for_once(n_bytes: int) -> tuple[Region, memoryview]:
    region = Region(n_bytes)
    region.use_only_once()
    return region, region.use()


def forget(region: Region) -> None:
    """Do not use a region again. Its receiver has gone, and may not have said that it is done with it."""
    with _choosing:
        if region in _kept:
            _kept.remove(region)


def give_back_unused(unused_s: float) -> bool:
    """Give the memory of those regions back to the system that were not used for so long; tell whether there were any.

    They can be used again, as if they were new. On other systems than Linux, nothing is given back.
    """
    if not hasattr(mmap, "MADV_REMOVE"):
        return False
    with _choosing:
        return sum(region.give_back(unused_s) for region in _kept) > 0


def map_region(file_descriptor: int) -> mmap.mmap:
    """Return the memory behind a region's file descriptor, which is closed."""
    try:
        found = os.fstat(file_descriptor)
        key = found.st_dev, found.st_ino  # not given to another file as long as it is mapped
        memory = _mapped.get(key)
        if memory is None:
            memory = _mapped[key] = mmap.mmap(file_descriptor, found.st_size)
        return memory
    finally:
        os.close(file_descriptor)


def is_used_again(memory: mmap.mmap) -> bool:
    """Tell whether another picture may come in the memory of a region."""
    return not memory[_USED_ONCE]


def pictures_in(memory: mmap.mmap) -> Callable[[int, int], Image.Image]:
    """Return a function that gives the pictures in the memory of a region in turn, each by its width and height.

    The sender gets the region back when the function and all pictures are gone, and copies of their Pillow core.
    """
    view = memoryview(memory)
    finalize(view, memory.__setitem__, _HANDED_OVER, 0).atexit = False
    start = _HEADER_BYTES

    def picture(width: int, height: int) -> Image.Image:
        nonlocal start
        core = _picture_core(view, start, (width, height))
        start += _room((width, height))
        return Image.new("RGB", (0, 0))._new(core)

    return picture


def _picture_core(view: memoryview, start: int, size: tuple[int, int]) -> Any:
    """Return what Pillow has behind an RGB picture, with its pixels in the view, which it keeps alive."""
    arguments = "RGB", _BYTES_A_PIXEL * size[0], 1
    return Image.core.map_buffer(view, size, "raw", start, arguments)  # type: ignore[attr-defined]


def n_bytes(size: tuple[int, int]) -> int:
    """Return how much room the pixels of a picture of this width and height take."""
    return _BYTES_A_PIXEL * size[0] * size[1]


def _room(size: tuple[int, int]) -> int:
    """Return the same, up to where the next picture may begin."""
    return -(-n_bytes(size) // _HEADER_BYTES) * _HEADER_BYTES


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
