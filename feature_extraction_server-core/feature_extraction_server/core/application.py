"""The application interface: what api plugins work with.

It knows the plugins and the defaults, and turns a request into a call of a model's function. Where the models live is
its subclass's business.
"""

from __future__ import annotations

import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_extraction_server.core.config import check_config
from feature_extraction_server.core.errors import (
    InvalidInput,
    ModelNotFound,
    NoDefault,
    ServerError,
    TaskNotFound,
    TaskNotSupported,
)
from feature_extraction_server.core.jobs import Call
from feature_extraction_server.core.plugins import Registry
from feature_extraction_server.core.result_cache import CachedRequest, is_random
from feature_extraction_server.core.server_settings import ServerSettings
from feature_extraction_server.core.task import Limits
from feature_extraction_server.core.tracking import current

if TYPE_CHECKING:
    from feature_extraction_server.core.job_runner import JobRunner


class ApplicationInterface(ABC):
    """The server's functions, free of HTTP. Every method may be called from any thread."""

    #: A directory of this server alone, where its processes meet; None where there is only this one.
    shared_directory: Path | None = None
    #: Runs stored jobs; made by the first api plugin that works with them (``job_runner.jobs_of``).
    jobs: JobRunner | None = None

    def __init__(self, registry: Registry, settings: ServerSettings) -> None:
        self.registry = registry
        self.settings = settings
        self.limits = settings.limits()
        self._may_draft = settings.draft_decoding.get()
        self._caches = settings.result_cache_bytes.get() > 0

    # Where the models live

    @abstractmethod
    def call(self, model: str, call: Call, deadline: float, is_wanted: Callable[[], bool]) -> Any:
        """Call a model's function and return its result.

        Args:
            deadline: when to give up, on the clock of ``time.monotonic()``.
            is_wanted: asked now and then, on this thread, whether somebody still waits for the result.

        Raises:
            ServerError: QueueFull, ModelError, ModelUnavailable, ModelLoadFailed, DeadlineExceeded,
                ClientDisconnected, or what the model's function raised of this kind.
        """

    @abstractmethod
    def recall(
        self, model: str, keys: Sequence[bytes], deadline: float, is_wanted: Callable[[], bool]
    ) -> list[bytes | None]:
        """Return the answers that ``remember`` kept under some keys; None for each that there is not.

        They are those of what the model has loaded now; while it does not run, there are none. Where they come from is
        noted in the request's record. Only with RESULT_CACHE_BYTES.

        Raises:
            ServerError: as ``call`` does.
        """

    @abstractmethod
    def remember(self, model: str, identity: bytes, answers: dict[bytes, bytes]) -> None:
        """Keep answers by their keys, as long as there is room: those that come from the origin of this identity.

        Only with RESULT_CACHE_BYTES.

        Raises:
            ServerError: they could not be kept.
        """

    @abstractmethod
    def start(self, model: str, *, wait: bool = False) -> None:
        """Start a model. Returns at once or, with ``wait``, when it runs.

        Raises:
            ModelNotFound: there is no such model.
            ModelUnavailable, ModelLoadFailed, DeadlineExceeded: with ``wait``, when it did not come to run.
        """

    @abstractmethod
    def stop(self, model: str, *, wait: bool = False) -> None:
        """Stop a model. Returns at once or, with ``wait``, when it is stopped.

        Raises:
            ModelNotFound: there is no such model.
            DeadlineExceeded: with ``wait``, when it takes longer than REQUEST_TIMEOUT.
        """

    @abstractmethod
    def status(self, model: str) -> dict[str, Any]:
        """Return a model's state, JSON-ready.

        Raises:
            ModelNotFound: there is no such model.
        """

    @abstractmethod
    def overview(self, timeout_s: float) -> list[dict[str, Any]]:
        """Return the status of every model and, as its ``tasks``, what was measured of each task. Starts nothing.

        Raises:
            ModelUnavailable: there is no engine process, so that no model runs.
            DeadlineExceeded: it did not answer in time.
        """

    def in_each_worker(self, begin: Callable[[], None]) -> None:
        """Call ``begin`` in each process that answers requests: at once, or as soon as it is forked."""
        begin()

    @property
    def is_ending(self) -> bool:
        """Whether the server is about to end, so that it is no use to begin anything."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Stop all models and give back everything that was started."""

    # What there is

    def list_tasks(self) -> list[str]:
        """Return the names of all tasks, sorted."""
        return sorted(self.registry.tasks)

    def list_models(self) -> list[str]:
        """Return the names of all models, sorted."""
        return sorted(self.registry.models)

    def list_plugins(self) -> list[dict[str, str | None]]:
        """Return kind, name, version, state and error of every plugin, those that are left out included."""
        return [plugin.report() for plugin in self.registry.plugins]

    def tasks_of(self, model: str) -> list[str]:
        """Return the tasks that a model implements, sorted.

        Raises:
            ModelNotFound: there is no such model.
        """
        self.require_model(model)
        return self.registry.tasks_of(model)

    def models_for(self, task: str) -> list[str]:
        """Return the models that implement a task, sorted.

        Raises:
            TaskNotFound: there is no such task.
        """
        self.require_task(task)
        return self.registry.models_for(task)

    def require_task(self, task: str) -> None:
        """Raise TaskNotFound unless there is such a task."""
        if task not in self.registry.tasks:
            raise TaskNotFound(self._not_found("task", task, self.list_tasks()))

    def require_model(self, model: str) -> None:
        """Raise ModelNotFound unless there is such a model."""
        if model not in self.registry.models:
            raise ModelNotFound(self._not_found("model", model, self.list_models()))

    # Requests

    def run(
        self,
        task: str | None,
        model: str | None,
        payload: dict[str, Any],
        *,
        is_wanted: Callable[[], bool] = lambda: True,
        timeout_s: float | None = None,
    ) -> Any:
        """Run a task on a model and return the JSON-ready result. Blocks.

        Args:
            task: None for the default one.
            model: None for the task's default one.
            payload: the task's input, by key.
            is_wanted: asked now and then whether somebody still waits for the result; if not, it is given up.
            timeout_s: how long it may take, loading included; None for REQUEST_TIMEOUT.

        Raises:
            ServerError: any of ``errors``.
        """
        deadline = time.monotonic() + (self.settings.request_timeout.get() if timeout_s is None else timeout_s)
        task, model = self.resolve(task, model)
        if (record := current.get()) is not None:
            record.task, record.model = task, model
        called = ModelFunction(self, task, model, deadline, is_wanted)
        declared = self.registry.spec(task) is not None
        if self._caches and declared and record is not None:
            if is_random(payload.get("config")):
                record.cache_status = "fes; fwd=bypass"
            else:
                called.cached = CachedRequest(self, model, record, deadline, is_wanted)
        function = self.registry.tasks[task].wrap(called)
        if declared:
            return function(**payload)
        return _call_by_signature(function, payload)

    def check(self, task: str | None, model: str | None, payload: dict[str, Any]) -> tuple[str, str, int | None]:
        """Check what can be told of a request without running it, in little time.

        Returns:
            its task, its model and, in batch mode, how many items it has.

        Raises:
            ServerError: as ``run`` does for the same request.
        """
        task, model = self.resolve(task, model)
        spec, config_type = self.registry.spec(task), self.registry.config_type(model, task)
        if spec is None:
            function = self.registry.tasks[task].wrap(ModelFunction(self, task, model, 0.0, lambda: False))
            _check_signature(function, payload)
            return task, model, None
        n_items = spec.check(payload, self.limits)
        if config_type is not None and payload.get("config") is not None:
            check_config(config_type, payload["config"])
        return task, model, n_items

    def limits_for(self, model: str, task: str) -> Limits:
        """Return what one request to a model may ask for."""
        size = self.registry.image_size(model, task) if self._may_draft else None
        return self.limits if size is None else replace(self.limits, draft_size=size)

    def resolve(self, task: str | None, model: str | None) -> tuple[str, str]:
        """Return which task and which model a request means.

        What it does not name is the configured default, or the only one that is possible.

        Raises:
            TaskNotFound, ModelNotFound: there is no such one.
            TaskNotSupported: the model does not implement the task.
            NoDefault: not named, not configured, and more than one is possible.
        """
        if model is not None:
            self.require_model(model)
        task = self._default_task(model) if task is None else task
        self.require_task(task)
        model = self._default_model(task) if model is None else model
        self.require_model(model)
        if task not in (tasks := self.registry.tasks_of(model)):
            known = ", ".join(tasks) or "no task"
            raise TaskNotSupported(f"the model {model} does not implement the task {task}; it implements {known}")
        return task, model

    def _default_task(self, model: str | None) -> str:
        possible = self.list_tasks() if model is None else self.registry.tasks_of(model)
        default = self.settings.default_task.get()
        if default is not None and (model is None or default in possible):
            return str(default)
        if len(possible) == 1:
            return possible[0]
        raise NoDefault(f"name a task, since DEFAULT_TASK decides nothing here; there are {', '.join(possible)}")

    def _default_model(self, task: str) -> str:
        default = self.settings.default_model(task)
        if default is not None:
            return default
        possible = self.registry.models_for(task)
        if len(possible) == 1:
            return possible[0]
        known = ", ".join(possible) or "none is installed"
        raise NoDefault(f"name a model, since DEFAULT_MODEL_{task.upper()} is not set; for the task {task}: {known}")

    def _not_found(self, kind: str, name: str, known: list[str]) -> str:
        if reason := self.registry.errors.get((f"{kind}s", name)):
            return f"the {kind} {name} is left out, since its plugin failed: {reason}"
        return f"there is no {kind} {name[:80]!r}; there are {', '.join(known) or 'none'}"


class ModelFunction:
    """A model's function for a task, as ``wrap`` receives it: calling it queues a job and waits for the result."""

    def __init__(
        self,
        application: ApplicationInterface,
        task: str,
        model: str,
        deadline: float,
        is_wanted: Callable[[], bool],
    ) -> None:
        self.__name__ = task
        self.limits = application.limits_for(model, task)
        self.cached: CachedRequest | None = None
        self._application = application
        self._model = model
        self._deadline = deadline
        self._is_wanted = is_wanted

    def __call__(self, *positional: Any, **arguments: Any) -> Any:
        fields = self._batch_fields()
        if fields and not arguments[fields[0]]:
            return []
        return self._call(Call(self.__name__, arguments, fields, positional))

    def call_in_parts(self, arguments: dict[str, Any], n_items: int, rest: Callable[[], dict[str, Any]]) -> Any:
        """Call the function with ``arguments`` and those that ``rest`` gives, which is called when they are needed."""
        return self._call(Call(self.__name__, arguments, self._batch_fields(), (), n_items, rest))

    def _batch_fields(self) -> tuple[str, ...]:
        spec = self._application.registry.spec(self.__name__)
        return spec.batch_fields if spec else ()

    def _call(self, call: Call) -> Any:
        config_type = self._application.registry.config_type(self._model, call.task)
        if config_type is not None and "config" in call.arguments:
            call.arguments["config"] = check_config(config_type, call.arguments["config"])
        return self._application.call(self._model, call, self._deadline, self._is_wanted)


def _call_by_signature(function: Callable[..., Any], payload: dict[str, Any]) -> Any:
    """Call a hand-written task. Its signature says which keys it takes, its ValueError what the client got wrong."""
    _check_signature(function, payload)
    try:
        return function(**payload)
    except ServerError:
        raise
    except ValueError as error:
        raise InvalidInput(str(error)) from error


def _check_signature(function: Callable[..., Any], payload: dict[str, Any]) -> None:
    try:
        inspect.signature(function, follow_wrapped=False).bind(**payload)
    except TypeError as error:
        raise InvalidInput(f"the keys do not fit the task: {error}") from None
