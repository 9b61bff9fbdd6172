"""One replica of a model on a Ray cluster: an actor that Ray Serve makes, on whichever node has room.

Ray sends this class itself to the node, by value, so that a node which lacks the rest can say so. Nothing of the
server may be imported before ``__init__`` runs there.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

NAMESPACE = "feature_extraction_server"
#: What stands around the reason in the error of a load that failed, which Ray Serve wraps in its own words.
FAILED = "<<load failed:"
END = ":load failed>>"
#: Changes with what a server and a replica say to each other: those of another one must not share replicas.
PROTOCOL = 1
#: How long a call is kept waiting for the head's store at most. Ray itself waits for a lost head for minutes.
HEAD_TIMEOUT_S = 1.0


def note_begin(mark: str) -> None:
    """Note in the head's store that the call with this mark is run, so that it is known of what a replica died."""
    with suppress(Exception):  # no head: the call does not need one
        _head().internal_kv_put(mark.encode(), b"", True, NAMESPACE.encode(), HEAD_TIMEOUT_S)


def was_running(mark: str) -> bool | None:
    """Tell whether the call with this mark is noted, and forget it. None where the head does not answer in time."""
    try:
        return bool(_head().internal_kv_del(mark.encode(), False, NAMESPACE.encode(), HEAD_TIMEOUT_S))
    except Exception:
        return None


def _head() -> Any:
    from ray.experimental import internal_kv

    return internal_kv.internal_kv_get_gcs_client()


class Replica:
    """Loads a model and runs its functions, one call after the other.

    Args:
        model: the model plugin's name.
        settings: those that were given to the server, by their names in the environment.
        log_level: the server's.
        grace_s: how long a call that nobody waits for any more may go on before the replica is given up and replaced.
    """

    def __init__(self, model: str, settings: dict[str, str], log_level: str, grace_s: float) -> None:
        self._model = model
        self._grace_s = grace_s
        self._threads = ThreadPoolExecutor(1, "model")  # some libraries want one thread for all they do
        try:
            self._threads.submit(self._load, settings, log_level).result()
        except BaseException as error:  # SystemExit too
            traceback.print_exc()
            raise RuntimeError(f"{FAILED}{json.dumps(self._reason(error))}{END}") from None

    def _load(self, settings: dict[str, str], log_level: str) -> None:
        os.environ.update(settings)
        logging.getLogger(NAMESPACE).setLevel(log_level)
        core = f"{NAMESPACE}.core"
        manager = importlib.import_module(f"{core}.settings").SettingsManager()
        importlib.import_module(f"{core}.memory").keep_freed_memory()
        self._module = importlib.import_module(f"{NAMESPACE}.models.{self._model}")
        getattr(self._module, "add_settings", lambda manager: None)(manager)
        manager.check()
        self._module.load_model()
        self._provenance: dict[str, str | None] = importlib.import_module(f"{core}.provenance").provenance_of(
            self._module
        )
        self._torch_threads = importlib.import_module(f"{core}.torch_threads")
        self._wire = importlib.import_module(f"{core}.wire")
        self._errors = importlib.import_module(f"{core}.errors")
        self._tracking = importlib.import_module(f"{core}.tracking")

    def _reason(self, error: BaseException) -> str:
        import ray

        node = f"on the node {ray.util.get_node_ip_address()}"
        if isinstance(error, ModuleNotFoundError):
            return f"{node}, there is no module {error.name}"
        return f"{node}, {getattr(error, 'message', None) or f'{type(error).__name__}: {error}'}"

    def reconfigure(self, configuration: dict[str, Any]) -> None:
        """Take what the server noted of the deployment, as Ray Serve has it done before the first call."""
        self._configuration: str = configuration["configuration"]

    def provenance(self) -> dict[str, str | None]:
        """Return where the answers come from."""
        return self._provenance

    async def call(
        self,
        configuration: str,
        function: str,
        positional: tuple[Any, ...],
        arguments: dict[str, Any],
        id: str | None,
        mark: str | None,
    ) -> tuple[bool | None, Any, dict[str, str | None]]:
        """Return whether a call succeeded, its result or its error, and where that comes from.

        Args:
            configuration: that of the model that the server wants. Where this is another one, nothing is run, and
                whether it succeeded is None: the application may have been replaced before the server saw it.
            mark: where a replica has died of it, or of another call there: under what to note that it is run.
        """
        if configuration != self._configuration:
            return None, None, self._provenance
        running = self._threads.submit(self._run, function, positional, arguments, id, mark)
        try:
            succeeded, answer = await asyncio.wrap_future(running)
        except asyncio.CancelledError:  # nobody waits for it any more; where it hangs, those after it still do
            if not running.cancel():
                self._end_if_it_hangs(running)
            raise
        return succeeded, answer, self._provenance

    def _end_if_it_hangs(self, running: Any) -> None:
        def end() -> None:
            sys.stderr.write(f"The model {self._model} hangs; its replica is given up\n")
            sys.stderr.flush()
            os._exit(1)

        timer = threading.Timer(self._grace_s, end)
        timer.daemon = True
        timer.start()
        running.add_done_callback(lambda _: timer.cancel())

    def _run(
        self, function: str, positional: Any, arguments: Any, id: str | None, mark: str | None
    ) -> tuple[bool, Any]:
        if mark is not None:
            note_begin(mark)
        try:
            return self._answer(function, positional, arguments, id)
        finally:
            # Before the next call is run: that may end this process while the answer is still on its way.
            if mark is not None:
                was_running(mark)

    def _answer(self, function: str, positional: Any, arguments: Any, id: str | None) -> tuple[bool, Any]:
        self._tracking.current.set(self._tracking.RequestRecord(id) if id else None)
        try:
            with self._torch_threads.at_work():
                return True, self._wire.without_torch(getattr(self._module, function)(*positional, **arguments))
        except self._errors.ServerError as error:
            return False, error.with_traceback(None)
        except BaseException as error:  # SystemExit too: whatever a model raises is its job's error
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            return False, self._errors.ModelError(f"the model {self._model} failed: {reason}")
