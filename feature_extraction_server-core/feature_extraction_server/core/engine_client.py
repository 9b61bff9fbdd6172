"""The engine from a web worker's side: the application interface over an engine in a process of its own.

All web workers of one server share one engine process (``engine_process``). They meet in a private directory, which
holds the engine's socket; the first worker that needs the engine starts it, under a file lock. The directory belongs
to the *owner*, the process whose end is the server's end: the engine goes when the owner has gone.

Messages are pickles (``wire``). That is safe since only this user can enter the directory.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from traceback import walk_stack
from typing import IO, Any, Final

from feature_extraction_server.core import patience, subprocesses
from feature_extraction_server.core.application import ApplicationInterface
from feature_extraction_server.core.cores import all_cores
from feature_extraction_server.core.errors import ClientDisconnected, DeadlineExceeded, ModelUnavailable, too_late
from feature_extraction_server.core.jobs import Call
from feature_extraction_server.core.plugins import Registry
from feature_extraction_server.core.server_settings import ServerSettings
from feature_extraction_server.core.tracking import Origin, Times, current
from feature_extraction_server.core.turns import waiting
from feature_extraction_server.core.wire import Channel, connect

logger = logging.getLogger(__name__)

ENGINE_MODULE: Final = "feature_extraction_server.core.engine_process"
START_TIMEOUT_S: Final = 60.0
#: How long an engine takes at most from its last word to its end.
END_TIMEOUT_S: Final = 1.0
MAX_RESTART_DELAY_S: Final = 30.0
#: How often one who waits for another to start the engine looks whether that is done.
LOCK_CHECK_INTERVAL_S: Final = 0.05
#: How many bytes the path of a Unix socket may have, on the system that allows the fewest.
MAX_SOCKET_PATH_BYTES: Final = 103
#: How long before the web worker gives up the engine must have said what goes wrong, so that it is heard.
DEADLINE_MARGIN_S: Final = 0.05
#: What the engine says instead of an answer where it wants the rest of a call's arguments.
REST_WANTED: Final = None

#: Whether the engine's function succeeded, its result or its error, ``Times`` and, where it is wanted, ``Origin``.
Answer = tuple[bool, Any, tuple[Any, ...] | None, tuple[Any, ...] | None]


class EngineClient(ApplicationInterface):
    """The application interface over the engine process that this server's web workers share.

    Args:
        owner_pid: the process whose end is the server's end: this one, or the master that started this worker.
    """

    shared_directory: Path

    def __init__(self, registry: Registry, settings: ServerSettings, owner_pid: int) -> None:
        super().__init__(registry, settings)
        self._check_interval_s = settings.result_check_interval
        self.owner_pid = owner_pid
        self._owner_born = process_start_time(owner_pid)
        self._directory = self.shared_directory = private_directory(owner_pid)
        self._idle: list[Channel] = []  # append and pop are atomic
        self._process: subprocess.Popen[bytes] | None = None
        # A forked worker must not share its parent's connections.
        os.register_at_fork(after_in_child=self._forget_connections)

    def call(self, model: str, call: Call, deadline: float, is_wanted: Callable[[], bool]) -> Any:
        request = ("call", model, tuple(call._replace(rest=None)), call.rest is not None, deadline)
        return self._ask(request, deadline, is_wanted, call.rest)

    def recall(
        self, model: str, keys: Sequence[bytes], deadline: float, is_wanted: Callable[[], bool]
    ) -> list[bytes | None]:
        found: list[bytes | None] = self._ask(("recall", model, keys), deadline, is_wanted)
        return found

    def remember(self, model: str, identity: bytes, answers: dict[bytes, bytes]) -> None:
        self._ask(("remember", model, identity, answers))

    def start(self, model: str, *, wait: bool = False) -> None:
        self.require_model(model)
        self._ask(("start", model, wait))

    def stop(self, model: str, *, wait: bool = False) -> None:
        self.require_model(model)
        self._ask(("stop", model, wait))

    def status(self, model: str) -> dict[str, Any]:
        self.require_model(model)
        status: dict[str, Any] = self._ask(("status", model))
        return status

    def overview(self, timeout_s: float) -> list[dict[str, Any]]:
        give_up_at = time.monotonic() + timeout_s
        try:
            connection = self._connect(timeout_s)
        except BlockingIOError:  # so many others wait for it already
            raise DeadlineExceeded("the engine process, which runs the models, does not answer") from None
        except OSError:
            raise ModelUnavailable("the engine process, which runs the models, does not run") from None
        try:
            connection.send((None, False, "overview", ""), timeout_s)
            if not connection.wait_for_news(max(0, give_up_at - time.monotonic())):
                raise DeadlineExceeded("the engine process, which runs the models, does not answer")
            succeeded, answer, *_ = connection.receive()
        except TimeoutError:
            raise DeadlineExceeded("the engine process, which runs the models, does not answer") from None
        except (OSError, EOFError):
            raise ModelUnavailable("the engine process, which runs the models, has just ended") from None
        finally:
            connection.close()
        if not succeeded:
            raise answer
        overview: list[dict[str, Any]] = answer
        return overview

    def preload(self) -> None:
        """If there are models to preload, start the engine, now and whenever it dies.

        The engine itself starts those models as soon as it runs.
        """
        if not self.settings.preload_models():
            return
        if os.getpid() != self.owner_pid:
            self._start_watcher()
            return
        self._idle.append(self._start_or_connect(START_TIMEOUT_S))
        # No thread here: the owner may be a master that forks its workers, where the thread would not exist.
        self.in_each_worker(self._start_watcher)

    def in_each_worker(self, begin: Callable[[], None]) -> None:
        if os.getpid() == self.owner_pid:  # a master, perhaps, that forks its workers
            os.register_at_fork(after_in_child=partial(_begin_in_worker, begin))
        else:
            begin()

    @property
    def is_ending(self) -> bool:
        return not is_alive(self.owner_pid, self._owner_born)

    def close(self) -> None:
        """End the engine, if it runs, and wait until it is gone. Only the owner's close does anything."""
        if os.getpid() != self.owner_pid:
            return
        with suppress(OSError, EOFError), closing(self._connect(END_TIMEOUT_S)) as connection:
            connection.send((None, "shutdown"))
            connection.wait_for_news(START_TIMEOUT_S)  # ends with the engine
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_TIMEOUT_S)
        while self._idle:
            self._idle.pop().close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _ask(
        self,
        request: tuple[Any, ...],
        deadline: float | None = None,
        is_wanted: Callable[[], bool] = lambda: True,
        rest: Callable[[], dict[str, Any]] | None = None,
    ) -> Any:
        _, model, *_ = request
        give_up_at = deadline
        if give_up_at is None:  # the engine itself waits no longer than REQUEST_TIMEOUT
            give_up_at = time.monotonic() + self.settings.request_timeout.get() + DEADLINE_MARGIN_S
        record = current.get()
        who = (None, False) if record is None else (record.id, record.wants_origin)
        try:
            connection = self._send((*who, *request), give_up_at)
        except TimeoutError:
            raise too_late(model) from None
        except OSError as error:  # out of file descriptors, say
            raise ModelUnavailable(f"the engine process cannot be reached: {error.strerror}", retry_after=1) from None
        try:
            received: Answer | None = self._receive(connection, give_up_at, is_wanted)
            if received is REST_WANTED and rest is not None:
                connection.send(rest(), max(DEADLINE_MARGIN_S, give_up_at - time.monotonic()))
                received = self._receive(connection, give_up_at, is_wanted)
            assert received is not None  # no call has more than one rest
            succeeded, answer, times, origin = received
        except TimeoutError:
            connection.close()  # by which the engine learns that nobody waits any more
            raise too_late(model) from None
        except (OSError, EOFError):
            connection.close()
            logger.error("The engine process ended while a request was with it")
            raise ModelUnavailable(
                "the engine process, which runs the models, ended while it worked on the request"
            ) from None
        except BaseException:
            connection.close()  # an answer that is still owed must not meet the next question
            raise
        self._idle.append(connection)
        if record is not None and times is not None:
            record.add(Times(*times))
        if record is not None and origin is not None:
            record.answer_origin = Origin(*origin)
        if succeeded:
            return answer
        try:
            raise answer
        finally:
            # An error that a frame of its own traceback knows stays until the next garbage collection, and keeps all
            # that those frames hold, the request's pictures among it.
            del answer, received

    def _send(self, request: tuple[Any, ...], give_up_at: float) -> Channel:
        """Send a request by an idle connection, or a new one, and return it."""
        while True:
            try:
                connection, is_new = self._idle.pop(), False
            except IndexError:
                seconds_left = max(DEADLINE_MARGIN_S, give_up_at - time.monotonic())
                connection, is_new = self._start_or_connect(seconds_left), True
            try:
                connection.send(request, max(DEADLINE_MARGIN_S, give_up_at - time.monotonic()))
                return connection
            except TimeoutError:
                connection.close()
                raise
            except OSError:  # the engine that it led to has died: nothing of the request has come to anybody
                connection.close()
                if is_new:
                    raise
            except BaseException:
                connection.close()
                raise

    @waiting()
    @patience.counted()
    def _receive(self, connection: Channel, give_up_at: float, is_wanted: Callable[[], bool]) -> Any:
        while True:
            remaining = give_up_at - time.monotonic()
            interval_s = patience.look_interval_s(self._check_interval_s)
            connection.set_patience(interval_s)
            try:
                if remaining < interval_s and not connection.wait_for_news(max(0, remaining)):
                    raise TimeoutError
                return connection.receive()
            except TimeoutError:
                if time.monotonic() >= give_up_at:
                    raise
                if not is_wanted():  # the connection is closed then, by which the engine learns of it
                    raise ClientDisconnected("the client has gone") from None

    def _connect(self, timeout_s: float) -> Channel:
        return connect(str(self._directory / "engine"), self._check_interval_s, timeout_s)

    def _connect_in_time(self, timeout_s: float) -> Channel | None:
        """Return a connection to the engine; None where it does not run.

        Raises:
            TimeoutError: it lets nobody in, since it is frozen, say, and others wait already.
        """
        try:
            return self._connect(timeout_s)
        except BlockingIOError:
            raise TimeoutError from None
        except OSError:
            return None

    def _start_or_connect(self, timeout_s: float) -> Channel:
        """Return a connection to the engine, which is started where it does not run.

        Raises:
            TimeoutError: as ``_connect_in_time`` does; or others were about to start it all the time.
            OSError, ModelUnavailable: it cannot be started.
        """
        give_up_at = time.monotonic() + timeout_s
        if (connection := self._connect_in_time(timeout_s)) is not None:
            return connection
        if not is_alive(self.owner_pid, self._owner_born):
            # Without its master, gunicorn's worker goes on as long as clients keep it busy: ask it to end.
            os.kill(os.getpid(), signal.SIGTERM)
            raise ModelUnavailable("the server is ending, since its main process has gone")
        self._require_same_user()
        private_directory(self.owner_pid)  # once more: a clean-up of temporary files may have taken it
        with (self._directory / "lock").open("w") as lock_file:
            _lock(lock_file, give_up_at)
            if (connection := self._connect_in_time(max(0, give_up_at - time.monotonic()))) is not None:
                return connection  # another worker was faster
            return self._start_engine()

    def _require_same_user(self) -> None:
        with suppress(FileNotFoundError):
            if self._directory.stat().st_uid != os.getuid():
                raise ModelUnavailable(
                    "this web worker runs as another user than the server's main process, and cannot use what that one "
                    "has made: start gunicorn as that user, in place of its option --user, or without --preload"
                )

    def _start_engine(self) -> Channel:
        command = [sys.executable, "-P", "-m", ENGINE_MODULE, str(self._directory), str(self.owner_pid)]
        environment = subprocesses.environment()
        # A session of its own, since a terminal's Ctrl-C must not end it before the requests that it works on.
        with all_cores():
            self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        give_up_at = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < give_up_at and self._process.poll() is None:
            with suppress(OSError):
                return self._connect(START_TIMEOUT_S)
            time.sleep(0.005)
        raise ModelUnavailable("the engine process, which runs the models, did not start; the log says why")

    def _start_watcher(self) -> None:
        threading.Thread(target=self._keep_engine_running, name="engine-watcher", daemon=True).start()

    def _keep_engine_running(self) -> None:
        """Start the engine again as soon as it has died, and slowly where it keeps dying."""
        delay_s = 0.0
        while True:
            born = time.monotonic()
            try:
                connection = self._start_or_connect(START_TIMEOUT_S)
                while not connection.wait_for_news(MAX_RESTART_DELAY_S):
                    pass  # nothing was asked: the only news can be the engine's end
                connection.close()
            except (OSError, ModelUnavailable):
                logger.exception("The engine process could not be started")
            if not is_alive(self.owner_pid, self._owner_born):
                return
            lived_s = time.monotonic() - born
            delay_s = 0.0 if lived_s > MAX_RESTART_DELAY_S else min(2 * delay_s + 0.1, MAX_RESTART_DELAY_S)
            time.sleep(delay_s)

    def _forget_connections(self) -> None:
        self._idle = []
        self._process = None


def _begin_in_worker(begin: Callable[[], None]) -> None:
    """Begin something in a process that was just forked, if it is to be a worker.

    On SIGUSR2 gunicorn forks a process that becomes another gunicorn: what is begun there would be cut off, and cores
    that it is kept to would be all that the other one has.
    """
    for frame, _ in walk_stack(sys._getframe()):
        if frame.f_code.co_name == "reexec" and frame.f_globals.get("__name__") == "gunicorn.arbiter":
            return
    begin()


def _lock(file: IO[str], give_up_at: float) -> None:
    """Lock a file until it is closed.

    Raises:
        TimeoutError: others had it locked all the time.
    """
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            seconds_left = give_up_at - time.monotonic()
            if seconds_left <= 0:
                raise TimeoutError from None
        time.sleep(min(LOCK_CHECK_INTERVAL_S, seconds_left))


def private_directory(owner_pid: int) -> Path:
    """Return a directory that only this user can enter, the same one for all processes of one owner.

    It lies where temporary files do; in ``/tmp`` where that would make its path too long for a socket.

    Raises:
        PermissionError: somebody else has put something in its place.
    """
    prefix = f"fes-{os.getuid()}-"
    name = f"{prefix}{owner_pid}-{process_start_time(owner_pid)}"
    parent = Path(tempfile.gettempdir())
    if len(os.fsencode(parent / name / "engine")) > MAX_SOCKET_PATH_BYTES:
        parent = Path("/tmp")
    for other in parent.glob(f"{prefix}*-*"):
        pid, _, born = other.name.removeprefix(prefix).partition("-")
        if not pid.isdecimal() or is_alive(int(pid), born):
            continue
        # Of a server and an engine that were both killed, or of a container that shares the directory, not the numbers
        # of its processes.
        if not is_listened_to(other / "engine"):
            shutil.rmtree(other, ignore_errors=True)
    directory = parent / name
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(f"{directory} is not a directory that only this user can enter")
    return directory


def is_listened_to(address: Path) -> bool:
    """Tell whether an engine listens at the socket."""
    try:
        connect(str(address), patience_s=1, timeout_s=0).close()
    except BlockingIOError:  # so many wait for it
        return True
    except OSError:
        return False
    return True


def is_alive(pid: int, born: str) -> bool:
    """Tell whether the process that started at ``born`` still runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process_start_time(pid) == born and _process_stat(pid)[:1] != ["Z"]  # a zombie has ended


def process_start_time(pid: int) -> str:
    """Return what tells a process from a later one of the same number; "0" where the system does not say."""
    stat_fields = _process_stat(pid)
    return stat_fields[19] if stat_fields else "0"


def _process_stat(pid: int) -> list[str]:
    """Return what the system says of a process, from its state on; nothing where it does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
