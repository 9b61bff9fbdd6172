"""Messages between the web workers and the engine: pickled objects over a Unix socket.

A message is a header (how many buffers, how long everything is), the pickle, and then the large buffers of the object
(pictures, samples, arrays), which pickle's protocol 5 leaves outside: they go from where they lie to the socket, and
from the socket to where they will lie, without being copied into the pickle.

Unpickling runs whatever the sender wants; only sockets in a private directory may be read.
"""

from __future__ import annotations

import io
import pickle
import select
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from PIL import Image

from feature_extraction_server.core.errors import ModelError

_HEADER: Final = struct.Struct("<IQ")  # how many buffers, how long the pickle; the buffers' lengths come after it
#: What a socket without an unread message takes at once. To set a timeout costs a system call, and Python's
#: interpreter lock, for which all threads of a busy web worker queue up.
_ALWAYS_FITS: Final = 1 << 15
STALL_TIMEOUT_S: Final = 60
_MAX_PARTS_A_CALL: Final = 512  # sendmsg takes IOV_MAX (1024) at most


class Channel:
    """One end of a connected socket. For one thread at a time."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._reader = connected.makefile("rb")
        self._poll = select.poll()
        self._poll.register(connected, select.POLLIN)

    def send(self, message: Any, timeout_s: float | None = None) -> None:
        """Send an object.

        Raises:
            PicklingError, TypeError, AttributeError: it cannot be pickled; nothing was sent.
            TimeoutError: the other end did not take it in time; the channel can only be closed then.
            OSError: the other end has gone.
        """
        buffers: list[pickle.PickleBuffer] = []
        file = io.BytesIO()
        _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(message)
        pickled = file.getvalue()
        header = _HEADER.pack(len(buffers), len(pickled))
        if not buffers and len(pickled) < _ALWAYS_FITS:
            self._socket.sendall(header + pickled)
            return
        views = [buffer.raw() for buffer in buffers]
        lengths = struct.pack(f"<{len(views)}Q", *(view.nbytes for view in views))
        with self._timeout(timeout_s):
            self._send_parts([memoryview(header + lengths + pickled), *views])

    def receive(self, timeout_s: float | None = None) -> Any:
        """Wait for an object and return it.

        Raises:
            TimeoutError: it did not come in time; the channel can only be closed then.
            EOFError, OSError: the other end has gone.
        """
        with self._timeout(timeout_s):
            n_buffers, pickled_length = _HEADER.unpack(self._read(_HEADER.size))
            lengths = struct.unpack(f"<{n_buffers}Q", self._read(8 * n_buffers)) if n_buffers else ()
            pickled = self._read(pickled_length)
            buffers = [self._read_buffer(length) for length in lengths]
        return pickle.loads(pickled, buffers=buffers)

    @contextmanager
    def _timeout(self, timeout_s: float | None) -> Iterator[None]:
        """Bound what is done with the socket meanwhile; afterwards it blocks again, as it does by default."""
        if timeout_s is None:
            yield
            return
        self._socket.settimeout(timeout_s)
        yield
        self._socket.settimeout(None)

    def wait_for_news(self, timeout_s: float) -> bool:
        """Wait until there is a message, or the other end has gone, or the time is up; tell whether there are news."""
        return bool(self._poll.poll(1000 * timeout_s))

    def close(self) -> None:
        self._reader.close()
        self._socket.close()

    def _read(self, n_bytes: int) -> bytes:
        data = self._reader.read(n_bytes) or b""  # None where it stalled
        if len(data) < n_bytes:
            raise EOFError("the other end has gone")
        return data

    def _read_buffer(self, n_bytes: int) -> bytearray:
        data = bytearray(n_bytes)
        view = memoryview(data)
        while view:
            n = self._reader.readinto(view)
            if not n:
                raise EOFError("the other end has gone")
            view = view[n:]
        return data

    def _send_parts(self, parts: list[memoryview]) -> None:
        while parts:
            n_sent = self._socket.sendmsg(parts[:_MAX_PARTS_A_CALL])
            while parts and n_sent >= parts[0].nbytes:
                n_sent -= parts.pop(0).nbytes
            if n_sent:
                parts[0] = parts[0][n_sent:]


def connect(path: str) -> Channel:
    """Connect to a listening Unix socket. An answer that stalls for ``STALL_TIMEOUT_S`` counts as the other end's end.

    Raises:
        OSError: nobody listens there.
    """
    client = socket.socket(socket.AF_UNIX)
    try:
        client.connect(path)
        # An answer that has begun to come is there at once, unless the other end is frozen.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", STALL_TIMEOUT_S, 0))
    except BaseException:
        client.close()
        raise
    return Channel(client)


def send_answer(channel: Channel, answer: tuple[bool, Any]) -> None:
    """Send whether a call succeeded, and its result or its error; tensors in the result become NumPy arrays.

    Raises:
        OSError: the other end has gone.
    """
    succeeded, result = answer
    try:
        channel.send((succeeded, _without_torch(result)))
    except (pickle.PicklingError, TypeError, AttributeError) as error:  # before a byte of it was sent
        channel.send((False, ModelError(f"the model's result cannot leave its process: {error}")))


def _without_torch(result: Any) -> Any:
    """Turn tensors, wherever they stand in a result, into NumPy arrays: not every process should need torch."""
    torch = sys.modules.get("torch")
    if torch is None:
        return result
    if isinstance(result, torch.Tensor):
        tensor = result.detach().cpu()
        return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
    if isinstance(result, (list, tuple)):
        return [_without_torch(element) for element in result]
    if isinstance(result, dict):
        return {key: _without_torch(element) for key, element in result.items()}
    return result


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        # A picture that was opened from a file is of the format's own class; only its pixels are to cross.
        if isinstance(obj, Image.Image) and obj.mode == "RGB":
            return _image_from, (obj.size, pickle.PickleBuffer(obj.tobytes()))
        return NotImplemented


def _image_from(size: tuple[int, int], pixels: Any) -> Image.Image:
    return Image.frombytes("RGB", size, pixels)
