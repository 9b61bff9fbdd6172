"""A model in a process of its own, so that one which crashes, leaks or holds the GIL harms nobody else.

``ModelProcess`` stands in for the model's module: its functions run in the process. The process is

    python -m feature_extraction_server.core.model_process SOCKET MODEL

and ends when the socket's other end is closed.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from copy import copy
from types import ModuleType
from typing import Any, Final

from feature_extraction_server.core import subprocesses, torch_threads
from feature_extraction_server.core.checkpoints import REPLICA_VARIABLE
from feature_extraction_server.core.errors import ModelError, ModelLoadFailed, ModelUnavailable, ServerError
from feature_extraction_server.core.plugins import NAMESPACE
from feature_extraction_server.core.progress import report
from feature_extraction_server.core.provenance import FILES, KEYS, difference, files_of, provenance_of
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.setup import set_up
from feature_extraction_server.core.tracking import RequestRecord, current
from feature_extraction_server.core.wire import Channel, send_answer

MODULE: Final = "feature_extraction_server.core.model_process"
PR_SET_PDEATHSIG: Final = 1  # of prctl(2)
END_TIMEOUT_S: Final = 10.0

logger = logging.getLogger(MODULE)  # in the process itself, __name__ is another


class ModelProcess:
    """A model's module in a process of its own: ``load_model`` starts the process, ``unload_model`` ends it.

    Any other attribute is the module's function of that name: calling it runs it in the process. For one thread;
    ``unload_model`` may be called from another one.

    Args:
        model: the model plugin's name.
        replica: which of several processes of the model this is.
        check_interval_s: how often ``is_wanted`` is asked during a call.
        is_needed: what is asked instead while the model is loaded.
    """

    def __init__(
        self, model: str, replica: int, check_interval_s: float, is_needed: Callable[[], bool] = lambda: True
    ) -> None:
        self.is_wanted = self._is_needed = is_needed
        self.provenance: dict[str, str | None] | None = None  # known once it is loaded
        self._model = model
        self._replica = replica
        self._check_interval_s = check_interval_s
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._changing = threading.RLock()  # held while the process is started or ended
        self._failure: BaseException | None = None  # why there will be no process any more

    @property
    def is_alive(self) -> bool:
        process = self._process
        return process is not None and process.poll() is None

    @property
    def pid(self) -> int | None:
        process = self._process
        return None if process is None else process.pid

    def spawn(self) -> None:
        """Start the process, from a thread that lives as long as it should: where threads end, Linux ends it too.

        Raises:
            ServerError: the model was unloaded, or failed to load: then with the same reason as before.
        """
        with self._changing:
            if self._failure is not None:
                raise copy(self._failure)  # each time another one: several threads raise them
            ours, theirs = socket.socketpair()
            command = [sys.executable, "-P", "-m", MODULE, str(theirs.fileno()), self._model]
            environment = subprocesses.environment() | {REPLICA_VARIABLE: str(self._replica)}
            with theirs:
                self._process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
                )
            self._channel = Channel(ours)

    def load_model(self) -> None:
        """Load the model in the process, which is started where there is none.

        Raises:
            ServerError: the model could not be loaded, or the process died of it. The process is ended then, for good.
        """
        if self._process is None:
            self.spawn()
        try:
            self._note(self._call("load_model"))
        except BaseException as error:
            if type(error) is ModelUnavailable and error.retry_after is None:  # the process died: so will the next one
                error = ModelLoadFailed(error.message)
            self.unload_model(error)
            raise error from None

    def _note(self, provenance: dict[str, str | None]) -> None:
        """Note where the process's answers come from; those of one that replaces it must come from there, too."""
        before = self.provenance or provenance
        if different := difference(provenance, before, (*KEYS, FILES)):
            raise ModelLoadFailed(f"what was loaded is not what the process before had: {different}")
        self.provenance = provenance

    def unload_model(self, reason: BaseException | None = None) -> None:
        """Have the process unload the model and end, for good: a call that is under way fails, and starts no other.

        Args:
            reason: what calls raise from now on.
        """
        with self._changing:
            if self._failure is None:
                reason = reason or ModelUnavailable(f"the model {self._model} was unloaded")
                self._failure = copy(reason)  # without the frames of the call that it came of, which hold its pictures
            self._end()

    def _end(self) -> None:
        """Have the process end; kill it if it takes longer than ``END_TIMEOUT_S``."""
        with self._changing:
            if self._process is None or self._channel is None:
                return
            channel, self._channel = self._channel, None
            channel.close()
            try:
                self._process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                logger.warning("The process of the model %s does not end and is killed", self._model)
                _kill(self._process)
            self._process = None

    def __getattr__(self, function: str) -> Callable[..., Any]:
        def call(*positional: Any, **arguments: Any) -> Any:
            if not self.is_alive:  # the last call may have killed it, or it died while there was nothing to do
                self.replace()
            return self._call(function, *positional, **arguments)

        return call

    def replace(self) -> None:
        """Start the process, which has died, anew and load the model in it.

        Raises:
            ServerError: as ``load_model`` does, from then on at once.
        """
        is_wanted, self.is_wanted = self.is_wanted, self._is_needed
        try:
            self._end()
            self.spawn()
            logger.error("The process of the model %s died and is replaced", self._model)
            self.load_model()
        finally:
            self.is_wanted = is_wanted

    def _call(self, function: str, *positional: Any, **arguments: Any) -> Any:
        process, channel = self._process, self._channel
        if process is None or channel is None:
            raise ModelUnavailable(f"the model {self._model} has no process")
        try:
            record = current.get()
            channel.send((function, positional, arguments, torch_threads.share(), record and record.id))
            while (reply := self._wait_for_reply(process, channel))[0] is None:
                report.get()(reply[1])
            succeeded, answer = reply
        except (OSError, EOFError):
            raise ModelUnavailable(f"the process of the model {self._model} died ({_how_it_died(process)})") from None
        if not succeeded:
            raise answer
        return answer

    def _wait_for_reply(self, process: subprocess.Popen[bytes], channel: Channel) -> Any:
        """Return whether a call succeeded, and its answer; or None and news of a download that a load waits for."""
        while not channel.wait_for_news(self._check_interval_s):
            if self._channel is not channel:  # closed meanwhile: its file descriptor may be another's by now
                raise EOFError
            if not self.is_wanted():
                logger.error("Nobody waits for the model %s any more; its process is killed", self._model)
                _kill(process)
        return channel.receive()


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _how_it_died(process: subprocess.Popen[bytes]) -> str:
    try:
        status = process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return "it closed its connection"
    return f"exit status {status}" if status >= 0 else signal.Signals(-status).name


def main(file_descriptor: int, model: str) -> None:
    """Load a model when asked and run its functions, until the other end has gone."""
    if sys.platform == "linux":  # a model that hangs in native code would not notice that the engine has gone
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    subprocesses.ignore_signals()
    channel = Channel(socket.socket(fileno=file_descriptor))
    set_up(SettingsManager(), kinds=subprocesses.KINDS)
    module = importlib.import_module(f"{NAMESPACE}.models.{model}")
    report.set(lambda download: channel.send((None, download)))
    try:
        while True:
            function, positional, arguments, n_threads, id = channel.receive()
            if function != "load_model":  # some libraries fix at load, for good, how many threads they have: then all
                torch_threads.take_share(n_threads)
            current.set(RequestRecord(id) if id else None)
            answer = _run(model, module, function, positional, arguments)
            del positional, arguments  # an idle model holds on to no client's images
            send_answer(channel.send, answer)
    except (EOFError, OSError):
        pass
    unload_model = getattr(module, "unload_model", None)
    if unload_model is not None:
        unload_model()
    logging.shutdown()
    os._exit(0)  # threads of libraries must not keep it


def _run(model: str, module: ModuleType, function: str, positional: Any, arguments: Any) -> tuple[bool, Any]:
    try:
        if function == "load_model":
            return True, _load(module)
        return True, getattr(module, function)(*positional, **arguments)
    except ServerError as error:
        return False, error.with_traceback(None)
    except BaseException as error:  # SystemExit too: whatever a model raises is its job's error
        logger.exception("The model %s failed in %s", model, function)
        reason = f"{type(error).__name__}: {error}"
        if function == "load_model":
            return False, ModelLoadFailed(reason)
        return False, ModelError(f"the model {model} failed: {reason}")


def _load(module: ModuleType) -> dict[str, str | None]:
    """Load a model, and return where its answers come from and which files that were before and after the load."""
    files = files_of(module)
    module.load_model()
    return provenance_of(module) | {FILES: f"{files} {files_of(module)}"}


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
