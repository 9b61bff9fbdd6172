"""Gunicorn's threaded worker, with turns: see ``core/turns.py``.

    gunicorn --worker-class feature_extraction_server.flask.worker.Worker

What reads only (GET), health checks among it, goes before what may ask a model.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import socket
import ssl
import threading
import time
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from functools import partial
from selectors import EVENT_READ
from typing import Any, Final

from flask import Flask
from gunicorn.util import close_graceful  # type: ignore[import-untyped]
from gunicorn.workers.gthread import STOP_KEEPALIVE_LINGER, TConn, ThreadWorker  # type: ignore[import-untyped]

from feature_extraction_server.core.cores import N_CORES
from feature_extraction_server.core.cut_off import cut_off
from feature_extraction_server.core.memory import give_back_memory
from feature_extraction_server.core.pixels import give_back_unused
from feature_extraction_server.core.turns import Turns, waiting
from feature_extraction_server.core.wire import set_timeout
from feature_extraction_server.flask.app import EXTENSION
from feature_extraction_server.flask.connection_counts import NO_MORE, ConnectionCount

#: One request runs Python code, while others decode pictures on all cores. More would only wait for its lock.
N_AT_ONCE: Final = 1 + min(N_CORES, 8)
#: How long a client may send nothing of a request that it has begun, and take nothing of its answer.
MAX_STALL_S = 60
#: How many bytes a second it must send at least, once it has sent its request for longer than that.
MIN_BYTES_PER_S = 500
#: How long a client may be connected before it sends its first request.
MAX_SILENCE_S: Final = 10.0
#: After how long without pictures a worker gives the memory back that it keeps for them.
GIVE_BACK_AFTER_S = 60.0
#: How long a worker leaves a new client to others that have fewer.
LEAVE_TO_OTHERS_S: Final = 0.0005
#: What the system says where there is no file descriptor or no memory for a client, who waits then.
_NOTHING_LEFT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
LOOK_AGAIN_AFTER_S: Final = 0.01
TELL_AGAIN_AFTER_S: Final = 60.0
_URGENT: Final = (b"GET ", b"HEAD ", b"OPTIONS ")
_PEEKED: Final = max(map(len, _URGENT))
_PEEK: Final = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)  # once, since flags are slow to combine
# Unlike the socket's own, it keeps Python's interpreter lock, since it never waits.
_recv: Final = ctypes.PyDLL(None, use_errno=True).recv


class _Connection(TConn):  # type: ignore[misc]
    """A client's connection, of which the main thread has nothing left to do but to give it back to the system.

    A client that sends nothing more of its request for ``MAX_STALL_S``, or hardly anything, counts as gone: one that
    has vanished without a word would hold a thread for ever.
    """

    _read_by = 0.0
    #: Whether the client counts as gone. What it may still send is the rest of its request, and must not be read as
    #: another one.
    is_given_up = False

    def begin_request(self) -> None:
        self._read_by = time.monotonic() + MAX_STALL_S

    def init(self) -> None:
        """Prepare for a request; gunicorn has just made the socket wait without end."""
        if not self.initialized:
            self._init_in_time()
        if self.cfg.is_ssl and not self.is_http2:
            self.sock.settimeout(MAX_STALL_S)  # over TLS, Python waits again where the system's timeout has ended it

    def _init_in_time(self) -> None:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            set_timeout(self.sock, option, MAX_STALL_S)
        with ExitStack() as bounded:
            if self.cfg.is_ssl:
                with suppress(OSError, RuntimeError):  # no file descriptor or thread is left: it has no bound
                    # The handshake, for which the socket becomes another one.
                    bounded.enter_context(cut_off(bounded.enter_context(self.sock.dup()), MAX_STALL_S))
            super().init()
        if self.is_http2:
            return
        read = self.parser.unreader.chunk

        def read_in_time(size: int | None = None) -> bytes:
            if time.monotonic() <= self._read_by:
                with suppress(BlockingIOError, TimeoutError, ssl.SSLWantReadError):
                    data: bytes = read(size)
                    self._read_by += len(data) / MIN_BYTES_PER_S
                    return data
            self.is_given_up = True
            return b""

        self.parser.unreader.chunk = read_in_time

    def close(self, graceful: bool = False) -> None:
        super().close()
        if self.parser is not None and not self.is_http2:
            vars(self.parser.unreader).pop("chunk", None)  # which knows the connection: else both stay until collected


class Worker(ThreadWorker):  # type: ignore[misc]
    """Accepts all clients that wait at once, and answers their requests in turn."""

    _look_at_memory_at = 0.0
    _tell_at = 0.0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._count = ConnectionCount()

    def get_thread_pool(self) -> Turns:
        return Turns(N_AT_ONCE, self.cfg.threads)

    def run(self) -> None:
        # gunicorn looks settings up 22 times a request, each by three calls. They stay what they are from here on.
        self.cfg.__dict__.update({name: setting.get() for name, setting in self.cfg.settings.items()})
        # What is loaded by now stays. To look through it all for garbage takes 60 ms, in which nobody is answered.
        gc.collect()
        gc.freeze()
        super().run()

    def set_accept_enabled(self, enabled: bool) -> None:
        super().set_accept_enabled(enabled)
        if enabled or self.alive:
            return
        # The end has begun, and may last until gunicorn kills the worker: others run its stored jobs meanwhile.
        application = self.wsgi.extensions[EXTENSION] if isinstance(self.wsgi, Flask) else None
        if application is not None and application.jobs is not None:
            threading.Thread(target=application.jobs.stop_running, name="jobs-end", daemon=True).start()

    def accept(self, listener: socket.socket) -> None:
        at_most = self.worker_connections - self.nr_conns
        if self.cfg.workers > 1:
            at_most = 1
            if self._count.is_ahead():
                time.sleep(LEAVE_TO_OTHERS_S)
        try:
            with self.tpool.held(), suppress(BlockingIOError, ConnectionAbortedError):
                for _ in range(at_most):
                    self._take(_Connection(self.cfg, *listener.accept(), listener.getsockname()))
        except OSError as error:
            if error.errno not in _NOTHING_LEFT:
                raise
            self._leave_waiting(error)

    def _leave_waiting(self, error: OSError) -> None:
        """Let clients wait until others have left, where the system has no file descriptor or memory for them."""
        if (now := time.monotonic()) >= self._tell_at:
            self._tell_at = now + TELL_AGAIN_AFTER_S
            self.log.warning("Clients have to wait: %s (%d are connected)", error.strerror, self.nr_conns)
        time.sleep(LOOK_AGAIN_AFTER_S)

    def _take(self, conn: TConn) -> None:
        """Let a new client's request wait for its turn if it has come, else wait for it."""
        self.nr_conns += 1
        conn.data_ready = True
        if (begun := _beginning(conn)) is not None:
            self._enqueue(conn, begun)
            return
        conn.timeout = time.monotonic() + MAX_SILENCE_S
        self.pending_conns.append(conn)
        self.poller.register(conn.sock, EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def enqueue_req(self, conn: TConn) -> None:
        self._enqueue(conn, b"" if self.tpool.is_free else _beginning(conn) or b"")

    def _enqueue(self, conn: TConn, begun: bytes) -> None:
        self.tpool.submit(partial(self._answer, conn), urgent=begun.startswith(_URGENT))

    def _answer(self, conn: TConn) -> None:
        done: Future[Any] = Future()
        conn.begin_request()
        try:
            is_open = self.handle(conn)
            if conn.is_given_up:
                is_open = False
            if is_open is True and self.alive and not conn.parser.unreader.buf.getvalue():
                self._keep(conn)
                return
            if not is_open:
                # Waits until the client closes its side, too, for 2 s at most: here, where it keeps nobody waiting.
                with waiting():
                    close_graceful(conn.sock)
            done.set_result(is_open)
        except Exception as error:
            done.set_exception(error)
        except BaseException:  # which would end the main thread, and with it the worker, or the server
            self.log.exception("A request ended by what ends a program")
            done.set_result(False)
        self.method_queue.defer(self.finish_request, conn, done)

    def _keep(self, conn: TConn) -> None:
        """Have the main thread wait for a client's next request, without waking it first, as gunicorn itself does."""
        conn.set_timeout()
        self.keepalived_conns.append(conn)
        try:
            self.poller.register(conn.sock, EVENT_READ, partial(self.on_client_socket_readable, conn))
        except BaseException:
            with suppress(ValueError):
                self.keepalived_conns.remove(conn)
            raise
        if not self.alive:  # since a moment
            self.method_queue.defer(self._cap_keepalive, time.monotonic() + STOP_KEEPALIVE_LINGER)

    def _cap_keepalive(self, deadline: float) -> None:
        # Other threads may add to the former. Nor has the end to wait for those who are connected and say nothing.
        for conn in (*self.keepalived_conns.copy(), *self.pending_conns):
            conn.timeout = min(conn.timeout, deadline)

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        self._count.tell(self.nr_conns if self._accepting else NO_MORE)
        if (soon := self.tpool.end_long_turns()) is not None:
            timeout = min(timeout, soon)
        super().wait_for_and_dispatch_events(timeout)
        if (now := time.monotonic()) >= self._look_at_memory_at:
            self._look_at_memory_at = now + GIVE_BACK_AFTER_S / 4
            if give_back_unused(GIVE_BACK_AFTER_S):
                give_back_memory()


def _beginning(conn: TConn) -> bytes | None:
    """Return the first bytes of what a client has sent; None where there is nothing yet."""
    begun = ctypes.create_string_buffer(_PEEKED)
    n = _recv(conn.sock.fileno(), begun, _PEEKED, _PEEK)
    if n < 0 and ctypes.get_errno() in (errno.EAGAIN, errno.EWOULDBLOCK):
        return None
    return begun.raw[: max(0, n)]
