"""Messages between the web workers and the engine: pickled objects over a Unix socket.

A message is a header, the pickle, and then the buffers of arrays, which pickle's protocol 5 leaves outside: they go
from where they lie to the socket, and from the socket to where they will lie. Pictures go through shared memory
(``pixels``): with the message comes the file descriptor of the memory that holds them, where they stay.

Unpickling runs whatever the sender wants; only sockets in a private directory may be read.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar
from weakref import ref

from PIL import Image

from feature_extraction_server.core import pixels
from feature_extraction_server.core.errors import ModelError

_HEADER: Final = struct.Struct("<IQ")  # how many buffers, how long the pickle; the buffers' lengths come after it
#: More than most messages have. Each system call more costs Python's interpreter lock, for which all threads of a busy
#: web worker queue up.
_READ_AT_ONCE: Final = 1 << 15
#: A socket's buffer has room for as much as a rule three times over.
_SMALL: Final = 1 << 16
STALL_TIMEOUT_S: Final = 60
_MAX_PARTS_A_CALL: Final = 512  # sendmsg takes IOV_MAX (1024) at most
_DESCRIPTOR: Final = struct.Struct("i")
_SEND_CHECK_INTERVAL_S: Final = 1  # how often one who sends looks at the time
#: In a list of nothing else, a vector say, there is no tensor and no array to look for.
SCALARS: Final = frozenset({float, int, str, bool, type(None)})


_Sent = TypeVar("_Sent")


class Channel:
    """One end of a connected socket. For one thread at a time."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._poll = select.poll()
        self._poll.register(connected, select.POLLIN)
        self._unread = b""  # what came together with the message before
        self._memory: mmap.mmap | None = None  # where the pictures of the message are that is being read
        self._kept_memory: mmap.mmap | None = None  # stays mapped for the next message
        # Where the pictures are that were sent last. What is used only once must not stay as long as an idle channel.
        self._region: ref[pixels.Region] | None = None
        set_timeout(connected, socket.SO_SNDTIMEO, _SEND_CHECK_INTERVAL_S)
        self._patience_s = math.inf

    def set_patience(self, seconds: float) -> None:
        """Have ``receive`` wait for a message for so long from now on, not for ever."""
        if seconds == self._patience_s:
            return
        set_timeout(self._socket, socket.SO_RCVTIMEO, seconds)
        self._patience_s = seconds

    def send(self, message: Any, timeout_s: float | None = None) -> None:
        """Send an object.

        Raises:
            PicklingError, TypeError and whatever else: it cannot be pickled; nothing was sent.
            TimeoutError: the other end did not take it in time; the channel can only be closed then.
            OSError: the other end has gone.
        """
        parts, pictures = _pickle(message)
        self._send_pickled(parts, pictures, math.inf if timeout_s is None else time.monotonic() + timeout_s)

    def send_if_small(self, message: Any) -> Callable[[], None] | None:
        """Send an object that the other end, which waits for it, need not take at once for the socket to do so.

        Returns:
            None, or what sends a larger one and may wait for the other end. It raises OSError.

        Raises:
            PicklingError, OSError and so on: as ``send`` does.
        """
        parts, pictures = _pickle(message)
        if pictures or sum(part.nbytes for part in parts) > _SMALL:
            return partial(self._send_pickled, parts, pictures, math.inf)
        self._send_pickled(parts, pictures, math.inf)
        return None

    def receive(self) -> Any:
        """Wait for an object and return it.

        Raises:
            TimeoutError: nothing came in time. It may be asked again.
            EOFError, OSError: the other end has gone, or has stalled within a message.
        """
        try:
            data, self._unread = self._unread or self._receive_some(), b""
        except BlockingIOError:
            raise TimeoutError from None
        if not data:
            raise _gone()
        if len(data) < _HEADER.size:
            data += self._read(_HEADER.size - len(data))
        n_arrays, pickled_length = _HEADER.unpack_from(data)
        start = _HEADER.size + 8 * n_arrays
        end = start + pickled_length
        if len(data) < end:
            data += self._read(end - len(data))
        self._unread = data[end:]
        pickled = data[start:end]
        if not n_arrays and self._memory is None:
            return pickle.loads(pickled)
        lengths = struct.unpack_from(f"<{n_arrays}Q", data, _HEADER.size)
        arrays = [self._read(length) for length in lengths]
        return _Unpickler(io.BytesIO(pickled), arrays, self._take_pictures).load()

    def _take_pictures(self) -> Callable[[int, int], Image.Image]:
        """Return a function that gives the pictures of the message in turn, each by its width and height."""
        memory, self._memory = self._memory, None
        if memory is None:
            raise EOFError("a picture was announced that did not come")
        self._kept_memory = memory if pixels.is_used_again(memory) else None
        return pixels.pictures_in(memory)

    def read_some(self) -> None:
        """Read some of what has come, for ``receive`` to return.

        Raises:
            EOFError, OSError: the other end has gone.
        """
        data = self._receive_some()
        if not data:
            raise _gone()
        self._unread += data

    @property
    def has_begun_message(self) -> bool:
        """Whether a message was read, or a part of it."""
        return bool(self._unread)

    @property
    def has_whole_message(self) -> bool:
        """Whether a message was read to its end, so that ``receive`` need not wait for it."""
        if len(self._unread) < _HEADER.size:
            return False
        n_arrays, pickled_length = _HEADER.unpack_from(self._unread)
        end_of_lengths = _HEADER.size + 8 * n_arrays
        if len(self._unread) < end_of_lengths:
            return False
        lengths = struct.unpack_from(f"<{n_arrays}Q", self._unread, _HEADER.size)
        return bool(len(self._unread) >= end_of_lengths + pickled_length + sum(lengths))

    def wait_for_news(self, timeout_s: float) -> bool:
        """Wait until there is a message, or the other end has gone, or the time is up; tell whether there are news."""
        return bool(self._unread or self._poll.poll(1000 * timeout_s))

    def close(self) -> None:
        region = None if self._region is None else self._region()
        if region is not None and region.is_handed_over:
            pixels.forget(region)
        with suppress(OSError):  # another thread may wait for a message: it is to hear of the end now
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _receive_some(self) -> bytes:
        data, ancillary, _, _ = self._socket.recvmsg(_READ_AT_ONCE, socket.CMSG_LEN(_DESCRIPTOR.size))
        if ancillary:
            self._memory = pixels.map_region(*_DESCRIPTOR.unpack(ancillary[0][2]))
        return data

    def _read(self, n_bytes: int) -> bytearray:
        data = bytearray(n_bytes)
        self._read_into(memoryview(data))
        return data

    def _read_into(self, view: memoryview) -> None:
        n = min(len(self._unread), len(view))
        view[:n] = self._unread[:n]
        self._unread = self._unread[n:]
        view = view[n:]
        give_up_at = time.monotonic() + STALL_TIMEOUT_S
        while view:
            try:
                n = self._socket.recv_into(view, 0, socket.MSG_WAITALL)
            except BlockingIOError:  # what has begun to come is there at once, unless the other end is frozen
                if time.monotonic() < give_up_at:
                    continue
                raise EOFError("the other end has stalled") from None
            if not n:
                raise _gone()
            view = view[n:]

    def _send_pickled(self, parts: list[memoryview], pictures: list[Image.Image], give_up_at: float) -> None:
        if pictures:
            self._send_with_pictures(parts, pictures, give_up_at)
        else:
            self._send_parts(parts, give_up_at)

    def _send_with_pictures(self, parts: list[memoryview], pictures: list[Image.Image], give_up_at: float) -> None:
        region, in_use = pixels.share(pictures)
        region.hand_over()
        del in_use
        self._region = ref(region)
        descriptor = _DESCRIPTOR.pack(region.file_descriptor)
        self._send_parts(parts, give_up_at, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptor)])

    def _send_parts(
        self, parts: list[memoryview], give_up_at: float, ancillary: list[tuple[int, int, bytes]] | None = None
    ) -> None:
        """Send what lies in several places, and a file descriptor with the first of it."""
        while parts:
            try:
                n_sent = self._socket.sendmsg(parts[:_MAX_PARTS_A_CALL], ancillary or ())
            except BlockingIOError:
                if time.monotonic() < give_up_at:
                    continue
                raise TimeoutError("the other end does not take the message") from None
            ancillary = None
            while parts and n_sent >= parts[0].nbytes:
                n_sent -= parts.pop(0).nbytes
            if n_sent:
                parts[0] = parts[0][n_sent:]


def set_timeout(connected: socket.socket, option: int, seconds: float) -> None:
    """Have a blocking socket raise BlockingIOError when it has waited for so long: SO_RCVTIMEO or SO_SNDTIMEO.

    Unlike Python's own timeouts, the system's cost no system call a message.
    """
    whole, part = divmod(max(1, round(seconds * 1e6)), 1_000_000)
    connected.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", whole, part))


def connect(path: str, patience_s: float, timeout_s: float) -> Channel:
    """Connect to a listening Unix socket.

    Args:
        patience_s: see ``Channel.set_patience``.
        timeout_s: how long to wait where more wait to be let in than the listener has room for.

    Raises:
        OSError: nobody listens there; BlockingIOError where it was not let in in time.
    """
    client = socket.socket(socket.AF_UNIX)
    set_timeout(client, socket.SO_SNDTIMEO, timeout_s)  # Python's own timeouts would not wait for that
    try:
        client.connect(path)
    except BaseException:
        client.close()
        raise
    channel = Channel(client)
    channel.set_patience(patience_s)
    return channel


def send_answer(send: Callable[[Any], _Sent], answer: tuple[Any, ...]) -> _Sent:
    """Send whether a call succeeded, its result or its error, and what else there is to say of it.

    Tensors in the result become NumPy arrays.

    Args:
        send: a channel's ``send`` or ``send_if_small``, whose value is returned.

    Raises:
        OSError: the other end has gone.
    """
    succeeded, result, *rest = answer
    try:
        return send((succeeded, without_torch(result), *rest))
    except OSError:
        raise
    except Exception as error:  # in turning or pickling it, before a byte of it was sent
        reason = f"{type(error).__name__}: {error}"
        return send((False, ModelError(f"the model's result cannot leave its process: {reason}"), *rest))


def without_torch(result: Any) -> Any:
    """Turn tensors, wherever they stand in a result, into NumPy arrays: not every process should need torch."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "Tensor"):  # nobody has it, or another thread is still importing it
        return result
    if isinstance(result, torch.Tensor):
        tensor = result.detach().cpu()
        return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
    if isinstance(result, (list, tuple)):
        if SCALARS.issuperset(map(type, result)):
            return result
        return [without_torch(element) for element in result]
    if isinstance(result, dict):
        return {key: without_torch(element) for key, element in result.items()}
    return result


def _pickle(message: Any) -> tuple[list[memoryview], list[Image.Image]]:
    """Return what is to be sent for an object, one part after the other, and the pictures that go with it."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(message)
    pickled, arrays = file.getvalue(), pickler.arrays
    lengths = struct.pack(f"<{len(arrays)}Q", *(array.nbytes for array in arrays)) if arrays else b""
    return [memoryview(_HEADER.pack(len(arrays), len(pickled)) + lengths + pickled), *arrays], pickler.pictures


class _Pickler(pickle.Pickler):
    """Leaves large arrays' buffers and all pictures out of the pickle, in the order in which they are to follow it."""

    def __init__(self, file: io.BytesIO) -> None:
        arrays: list[memoryview] = []
        # Not a method of its own: a pickler that knows itself would keep all that it has seen until the garbage is
        # looked for.
        super().__init__(file, protocol=5, buffer_callback=lambda buffer: arrays.append(buffer.raw()))
        self.arrays = arrays
        self.pictures: list[Image.Image] = []

    def reducer_override(self, obj: Any) -> Any:
        # A picture that was opened from a file is of the format's own class; only its pixels are to cross.
        if isinstance(obj, Image.Image) and obj.mode == "RGB":
            self.pictures.append(obj)
            return _picture, obj.size
        return NotImplemented


def _picture(width: int, height: int) -> Image.Image:
    """Stand for the next picture of a message in its pickle: ``_Unpickler`` has it."""
    raise NotImplementedError


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        file: io.BytesIO,
        arrays: list[bytearray],
        take_pictures: Callable[[], Callable[[int, int], Image.Image]],
    ) -> None:
        super().__init__(file, buffers=arrays)
        self._take_pictures = take_pictures
        self._next_picture: Callable[[int, int], Image.Image] | None = None

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) != (__name__, "_picture"):
            return super().find_class(module, name)
        if self._next_picture is None:
            self._next_picture = self._take_pictures()
        return self._next_picture


def _gone() -> EOFError:
    return EOFError("the other end has gone")
