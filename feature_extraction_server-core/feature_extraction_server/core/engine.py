"""The engine: all models and their consumers, in this process."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

from feature_extraction_server.core.application import ApplicationInterface
from feature_extraction_server.core.errors import ClientDisconnected, DeadlineExceeded, ModelUnavailable, ServerError
from feature_extraction_server.core.jobs import Call, Job
from feature_extraction_server.core.logs import LogServer
from feature_extraction_server.core.model import Model, State
from feature_extraction_server.core.plugins import Registry
from feature_extraction_server.core.result_cache import ResultCache
from feature_extraction_server.core.server_settings import ServerSettings
from feature_extraction_server.core.tracking import current

logger = logging.getLogger(__name__)


class Engine(ApplicationInterface):
    """The application interface over models that live in this process. Makes no thread before a model starts."""

    def __init__(self, registry: Registry, settings: ServerSettings, log_server: LogServer) -> None:
        super().__init__(registry, settings)
        self._max_loaded = settings.max_loaded_models.get()
        self._starting = threading.Lock()  # one model starts at a time where MAX_LOADED_MODELS is set
        self._cache = ResultCache(settings.result_cache_bytes.get())
        self.models: Final[dict[str, Model]] = {}
        for name, module in registry.models.items():
            consumer_type = settings.consumer_type(name)
            start_consumer = registry.consumers[consumer_type].start
            options = settings.model_options(name)
            self.models[name] = Model(name, module, consumer_type, start_consumer, log_server, options)
        self._preloaded = [name for name in settings.preload_models() if name in self.models]

    def call(self, model: str, call: Call, deadline: float, is_wanted: Callable[[], bool]) -> Any:
        job = Job(call)
        self.submit(model, job, deadline, is_wanted)
        if job.future.cancelled():
            raise ClientDisconnected("the client has gone")
        try:
            return self.models[model].wait(job, deadline, is_wanted)
        finally:
            if job.request is not None:
                job.request.add(job.times())
                job.request.answer_origin = job.origin

    def submit(self, model: str, job: Job, deadline: float, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Queue a job, and start its model where it does not run. One that is not wanted any more is cancelled.

        Raises:
            QueueFull, ModelLoadFailed, ModelUnavailable: as ``Model.submit`` does.
            ModelUnavailable: MAX_LOADED_MODELS others are loaded, and none of them was idle before the deadline; or
                the model was stopped meanwhile.
        """
        if self._max_loaded and not self.models[model].is_active:
            still_wanted = partial(self._is_wanted, model, job, self.models[model].n_stops, is_wanted)
            self._start_in_turn(model, deadline, still_wanted)
            if not still_wanted():  # who asked has left meanwhile
                job.cancel()
                return
        self.models[model].submit(job)

    def _is_wanted(self, name: str, job: Job, n_stops: int, is_wanted: Callable[[], bool]) -> bool:
        """Tell whether a model is to be started for a job.

        Raises:
            ModelLoadFailed, ModelUnavailable: it failed to load a moment ago, or was stopped since ``n_stops``.
        """
        self.models[name].require_retry()
        if self.models[name].n_stops != n_stops:
            raise ModelUnavailable(f"the model {name} was stopped")
        return not job.ended and is_wanted()

    def notice_dead_consumers(self) -> None:
        """If a model's consumer died without a word, say so to everybody who waits for it."""
        for model in self.models.values():
            if model.has_dead_consumer:  # it unloads the model, which may take a while
                threading.Thread(target=model.notice_dead_consumer, name=f"end-{model.name}", daemon=True).start()

    def recall(
        self, model: str, keys: Sequence[bytes], deadline: float, is_wanted: Callable[[], bool]
    ) -> list[bytes | None]:
        origin = self.models[model].origin_in_use()
        if (record := current.get()) is not None:
            record.answer_origin = origin
        if origin is None:
            self._cache.count_misses(model, len(keys))
            return [None] * len(keys)
        return self._cache.look_up(model, [origin.identity + key for key in keys])

    def remember(self, model: str, identity: bytes, answers: dict[bytes, bytes]) -> None:
        for key, answer in answers.items():
            self._cache.keep(model, identity + key, answer)

    def start(self, model: str, *, wait: bool = False) -> None:
        n_stops = self._model(model).n_stops

        def is_wanted() -> bool:
            return self.models[model].n_stops == n_stops

        if not self._max_loaded or self._model(model).is_active:
            self._model(model).start()
        elif wait:
            self._start_in_turn(model, self._deadline(), is_wanted)
        else:  # making room takes a while, and nobody waits for it
            starter = threading.Thread(
                target=self._try_to_start_in_turn, args=(model, is_wanted), name=f"start-{model}", daemon=True
            )
            starter.start()
        if not wait:
            return
        ends = (State.RUNNING, State.FAILED, State.STOPPED)
        state = self._model(model).wait_for_state(ends, self._deadline())
        if state is State.FAILED:
            raise self._model(model).failure()
        if state is State.STOPPED:
            raise ModelUnavailable(f"the model {model} was stopped while it was starting")

    def stop(self, model: str, *, wait: bool = False) -> None:
        self._model(model).stop()
        if wait:
            self._model(model).wait_for_state(set(State) - {State.STOPPING}, self._deadline())

    def status(self, model: str) -> dict[str, Any]:
        return self._model(model).status()

    def overview(self, timeout_s: float) -> list[dict[str, Any]]:
        told = [model.overview() for model in self.models.values()]
        if not self._caches:
            return told
        return [overview | {"cache": self._cache.told(overview["model"])} for overview in told]

    def preload(self) -> None:
        """Start the models that PRELOAD_MODELS names, but those whose plugin is left out."""
        for name in self._preloaded:
            self.start(name)

    def retry_preloaded(self) -> None:
        """Start those of them again that have failed, where there is room. To be called now and then.

        Who sends requests only to servers that are ready would never start one.
        """
        for name in self._preloaded:
            if not self._max_loaded:
                self.models[name].retry()
            elif self._starting.acquire(blocking=False):  # whoever has it may wait for room for long
                try:
                    if len(self._others_loaded(name)) < self._max_loaded:
                        self.models[name].retry()
                finally:
                    self._starting.release()

    def close(self) -> None:
        """Stop all models; who still runs after the grace period is left to the process's end."""
        if self.jobs is not None:
            self.jobs.close()
        for model in self.models.values():
            model.stop(asked=False)
        give_up_at = time.monotonic() + self.settings.stop_grace_period
        for model in self.models.values():
            model.join(max(0, give_up_at - time.monotonic()))

    def _start_in_turn(self, name: str, deadline: float, is_wanted: Callable[[], bool]) -> None:
        """Start a model when fewer than MAX_LOADED_MODELS others are loaded, and stop idle ones to that end.

        Args:
            is_wanted: tells whether it is to be started still. If not, no other one is stopped for it. What it raises
                is raised.

        Raises:
            ModelUnavailable: too many are loaded, and none of them was idle before the deadline.
        """
        if not self._wait_for_turn(name, deadline, is_wanted):
            return
        try:
            while is_wanted() and not self.models[name].is_active and not self._make_room(name, deadline):
                if time.monotonic() >= deadline:
                    raise self._no_room(name)
                time.sleep(self._look_interval_s(name, deadline))
            if is_wanted():
                self.models[name].start()
        finally:
            self._starting.release()

    def _wait_for_turn(self, name: str, deadline: float, is_wanted: Callable[[], bool]) -> bool:
        """Wait for ``_starting``, and tell whether it was got; not so where the model is not wanted any more."""
        while is_wanted():
            if self._starting.acquire(timeout=self._look_interval_s(name, deadline)):
                return True
            if time.monotonic() >= deadline:
                raise self._no_room(name)
        return False

    def _look_interval_s(self, name: str, deadline: float) -> float:
        """Return how long one who waits for room may wait before the next look at what has changed."""
        return max(0, min(self.models[name].options.result_check_interval, deadline - time.monotonic()))

    def _no_room(self, name: str) -> ModelUnavailable:
        return ModelUnavailable(
            f"the model {name} cannot be loaded: {self._max_loaded} models are loaded and at work (MAX_LOADED_MODELS)",
            retry_after=1,
        )

    def _make_room(self, name: str, deadline: float) -> bool:
        """Tell whether there is room for one more model; if there is not, stop the one that was idle longest."""
        others = self._others_loaded(name)
        if len(others) < self._max_loaded:
            return True
        idle = [(since, model.name) for model in others if (since := model.idle_since) is not None]
        if idle:
            _, longest = min(idle)
            self.models[longest].stop(asked=False)
            with suppress(DeadlineExceeded):  # the caller looks at the time
                self.models[longest].wait_for_state(set(State) - {State.STOPPING}, deadline)
        return False

    def _others_loaded(self, name: str) -> list[Model]:
        return [model for model in self.models.values() if model.is_active and model.name != name]

    def _try_to_start_in_turn(self, name: str, is_wanted: Callable[[], bool]) -> None:
        try:
            self._start_in_turn(name, self._deadline(), is_wanted)
        except ServerError as error:
            logger.warning("The model %s was not started: %s", name, error.message)

    def _model(self, name: str) -> Model:
        self.require_model(name)
        return self.models[name]

    def _deadline(self) -> float:
        return time.monotonic() + float(self.settings.request_timeout.get())
