"""A bound for what goes on over a socket, whatever it is."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def cut_off(connected: socket.socket, seconds: float) -> Iterator[None]:
    """Shut a socket down when the time is up: a timeout of its own would begin anew with every byte."""

    def shut_down() -> None:
        with suppress(OSError):
            # TLS sockets have a method of their own, after which the reader would go on without TLS.
            socket.socket.shutdown(connected, socket.SHUT_RDWR)

    timer = threading.Timer(seconds, shut_down)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # else it might shut another socket down that gets this one's number
