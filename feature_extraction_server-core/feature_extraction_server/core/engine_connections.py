"""The web workers' connections to the engine process.

One thread reads what all of them ask. A call of a running model is queued there and then, and answered by the thread
that has its result: none waits meanwhile, however many calls are under way. What may take a while gets a thread of its
own: a message that has not come as a whole, a model that is to be started first, an answer that is larger than what a
socket takes at once.

Deadlines are the business of the web workers, whose threads wait anyway: one that gives up closes its connection.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Final, NamedTuple

from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.engine_client import DEADLINE_MARGIN_S, ENGINE_MODULE, REST_WANTED, Answer
from feature_extraction_server.core.errors import ServerError, too_late
from feature_extraction_server.core.jobs import Call, Job
from feature_extraction_server.core.model import Model
from feature_extraction_server.core.tracking import RequestRecord, current
from feature_extraction_server.core.wire import Channel, send_answer

logger = logging.getLogger(ENGINE_MODULE)

RETRY_DELAY_S: Final = 0.2


class Connections:
    """All connections of one engine.

    Args:
        listener: a listening socket, by which the web workers come.
        ending: set when one of them wants the process to end.
    """

    def __init__(self, listener: socket.socket, engine: Engine, ending: threading.Event) -> None:
        self._engine = engine
        self._ending = ending
        # One thread waits for what has come. Others may add to what it waits for meanwhile.
        self._selector = selectors.DefaultSelector()
        self._open: set[Connection] = set()
        self._listeners: list[socket.socket] = []
        self.listen(listener)

    def listen(self, listener: socket.socket) -> None:
        """Let web workers come by this listening socket, too."""
        listener.setblocking(False)
        self._listeners.append(listener)
        self._wait_for_workers(listener)

    def serve(self) -> None:
        """Serve as long as the process lives."""
        while True:
            try:
                for key, _ in self._selector.select():
                    key.data()
            except Exception:
                logger.exception("The engine failed on its connections")
                time.sleep(RETRY_DELAY_S)  # not a reason to spin

    def look_round(self) -> None:
        """Do what nothing else gives the occasion for; to be called now and then, by one other thread."""
        for connection in list(self._open):
            connection.end_overdue_call()
        for listener in self._listeners:
            if listener not in self._selector.get_map():
                self._wait_for_workers(listener)

    def _wait_for_workers(self, listener: socket.socket) -> None:
        self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener))

    def _accept(self, listener: socket.socket) -> None:
        try:
            connected, _ = listener.accept()
        except BlockingIOError:  # who came has left
            return
        except OSError:
            logger.exception("A connection of a web worker could not be accepted")
            self._selector.unregister(listener)  # out of file descriptors, say: not a reason to spin
            return
        connected.setblocking(True)
        connection = Connection(connected, self._engine, self._ending)
        self._open.add(connection)
        self._wait_for(connection)

    def _wait_for(self, connection: Connection) -> None:
        self._selector.register(connection.socket, selectors.EVENT_READ, partial(self._read, connection))

    def _read(self, connection: Connection) -> None:
        try:
            connection.channel.read_some()
            while connection.channel.has_whole_message:
                connection.take(connection.channel.receive())
            if connection.channel.has_begun_message:
                self._selector.unregister(connection.socket)
                threading.Thread(target=self._read_rest, args=(connection,), name="connection", daemon=True).start()
        except Exception as error:  # whatever it is, it must not keep the others from being served
            with suppress(KeyError):
                self._selector.unregister(connection.socket)
            self._close(connection, error)

    def _read_rest(self, connection: Connection) -> None:
        try:
            while connection.channel.has_begun_message:
                connection.take(connection.channel.receive())
            self._wait_for(connection)
        except Exception as error:
            self._close(connection, error)

    def _close(self, connection: Connection, error: Exception) -> None:
        if not isinstance(error, (EOFError, OSError)):  # by which the web worker has left
            logger.error("The engine failed on a connection", exc_info=error)
        self._open.discard(connection)
        connection.close()


class _Called(NamedTuple):
    """A call of a model that has no answer yet."""

    number: int
    model: Model
    job: Job
    deadline: float
    wants_origin: bool


class Connection:
    """A web worker's connection, by which it asks one thing at a time."""

    def __init__(self, connected: socket.socket, engine: Engine, ending: threading.Event) -> None:
        self.socket: Final = connected
        self.channel: Final = Channel(connected)
        self._engine = engine
        self._ending = ending
        self._lock = threading.Lock()  # held while something is sent
        self._is_closed = False
        self._n_asked = self._n_answered = 0
        self._called: _Called | None = None
        self._rest_is_due = False  # whether the next message is the rest of a call's arguments

    def take(self, message: Any) -> None:
        """Begin to do what a web worker asks. Raises nothing of what goes wrong with it."""
        if self._rest_is_due:
            self._rest_is_due = False
            if (called := self._called) is not None:
                called.model.complete(called.job, message)
        elif message == (None, "shutdown"):
            self._ending.set()  # the process's end closes the connection, which tells the client
        else:
            id, wants_origin, method, model, *arguments = message
            record = RequestRecord(id) if id else None
            do = self._call if method == "call" else partial(self._ask, method)
            self._n_asked += 1
            asked = (self._n_asked, record, do, wants_origin, model, *arguments)
            if method == "call" and model in self._engine.models and self._engine.models[model].is_running:
                self._run(*asked)
            else:
                threading.Thread(target=self._run, args=asked, name="request", daemon=True).start()

    def end_overdue_call(self) -> None:
        """End a call whose web worker has not given it up at its deadline, as one that is frozen does not."""
        called = self._called
        if called is not None and called.deadline < time.monotonic():
            called.job.fail(too_late(called.model.name))

    def close(self) -> None:
        """Close it, and give up what has no answer yet."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # so that whoever sends something holds the lock no longer
        with self._lock:
            called, self._called = self._called, None
            self._is_closed = True
            self.channel.close()
        if called is not None:
            called.job.cancel()
            called.model.leave(called.job, failed=called.deadline <= time.monotonic())

    def _run(self, number: int, record: RequestRecord | None, do: Callable[..., None], *asked: Any) -> None:
        """Do what was asked, and answer with the error of what goes wrong."""
        current.set(record)
        try:
            do(number, *asked)
        except ServerError as error:
            error.with_traceback(None)  # whose frames hold the call's pictures
            self._send(number, (False, error, None, None))
        except Exception:
            logger.exception("The engine failed on a request")
            failure = ServerError("the engine failed on this request; its log says why")
            self._send(number, (False, failure, None, None))
        finally:
            current.set(None)

    def _call(
        self, number: int, wants_origin: bool, name: str, call: Sequence[Any], has_rest: bool, deadline: float
    ) -> None:
        job = Job(Call(*call), is_complete=not has_rest)
        called = _Called(number, self._engine.models[name], job, deadline, wants_origin)
        with self._lock:
            if self._is_closed:  # while there was no thread for it yet
                return
            self._called = called
        # They know the job by its number only. A job that its own future knows would stay, with its pictures, until the
        # next garbage collection.
        if job.due is not None:
            job.due.add_done_callback(partial(self._ask_for_rest, number))
        job.future.add_done_callback(partial(self._answer, number))
        try:
            # The web worker is to hear what goes wrong before it gives up.
            self._engine.submit(name, job, deadline - DEADLINE_MARGIN_S)
        except BaseException:
            with self._lock:
                if self._called is called:  # not a later one, begun since this one was answered at its deadline
                    self._called = None
            raise
        if job.ended:  # the web worker has left while the model was being started
            called.model.leave(job)

    def _ask_for_rest(self, number: int, due: Future[None]) -> None:
        with self._lock:
            if self._called is None or self._called.number != number or due.exception() is not None:
                return
            self._rest_is_due = True
            with suppress(OSError):
                self.channel.send(REST_WANTED)

    def _answer(self, number: int, result: Future[Any]) -> None:
        with self._lock:
            called = self._called
            if called is None or called.number != number:
                return
            self._called = None
        error = result.exception()
        called.model.leave(called.job, failed=isinstance(error, ServerError) and error.status >= 500)
        origin = called.job.origin if called.wants_origin else None
        answer = result.result() if error is None else error
        self._send(number, (error is None, answer, tuple(called.job.times()), origin and tuple(origin)))

    def _ask(self, method: str, number: int, wants_origin: bool, model: str, *arguments: Any) -> None:
        answer = _ask(self._engine, method, model, arguments)
        record = current.get()
        origin = record.answer_origin if record is not None and wants_origin else None
        self._send(number, (True, answer, None, origin and tuple(origin)))

    def _send(self, number: int, answer: Answer) -> None:
        """Send the answer to what was asked as the ``number``-th, unless it has one: the next would get the second."""
        with self._lock, suppress(OSError):  # the web worker has left
            if self._is_closed or number <= self._n_answered:
                return
            self._n_answered = number
            if (send_later := send_answer(self.channel.send_if_small, answer)) is None:
                return
            try:
                threading.Thread(target=self._send_slowly, args=(send_later,), name="answer", daemon=True).start()
            except RuntimeError:  # the system has none left: the web worker is to hear of it now
                logger.error("There is no thread to send a large answer")
                self.socket.shutdown(socket.SHUT_RDWR)

    def _send_slowly(self, send: Callable[[], None]) -> None:
        with self._lock, suppress(OSError):
            if not self._is_closed:
                send()


def _ask(engine: Engine, method: str, model: str, arguments: Sequence[Any]) -> Any:
    """Call one of the engine's other methods."""
    if method == "recall":
        (keys,) = arguments
        return engine.recall(model, keys, 0.0, lambda: True)
    if method == "remember":
        identity, answers = arguments
        return engine.remember(model, identity, answers)
    if method == "status":
        return engine.status(model)
    if method == "overview":
        return engine.overview(0)
    (wait,) = arguments
    return (engine.start if method == "start" else engine.stop)(model, wait=wait)
