"""The engine: all models and their consumers, in this process."""

from __future__ import annotations

import time
from typing import Any

from feature_extraction_server.core.application import ApplicationInterface
from feature_extraction_server.core.errors import ModelLoadFailed, ModelUnavailable
from feature_extraction_server.core.jobs import Job
from feature_extraction_server.core.logs import LogServer
from feature_extraction_server.core.model import Model, State
from feature_extraction_server.core.plugins import Registry
from feature_extraction_server.core.server_settings import ServerSettings


class Engine(ApplicationInterface):
    """The application interface over models that live in this process. Makes no thread before a model starts."""

    def __init__(self, registry: Registry, settings: ServerSettings, log_server: LogServer) -> None:
        super().__init__(registry, settings)
        self._models: dict[str, Model] = {}
        for name, module in registry.models.items():
            consumer_type = settings.consumer_type(name)
            start_consumer = registry.consumers[consumer_type].start
            options = settings.model_options(name)
            self._models[name] = Model(name, module, consumer_type, start_consumer, log_server, options)

    def call(self, model: str, job: Job, deadline: float) -> Any:
        self._models[model].submit(job)
        return self._models[model].wait(job, deadline)

    def start(self, model: str, *, wait: bool = False) -> None:
        self._model(model).start()
        if not wait:
            return
        ends = (State.RUNNING, State.FAILED, State.STOPPED)
        state = self._model(model).wait_for_state(ends, self._deadline())
        if state is State.FAILED:
            raise ModelLoadFailed(self.status(model)["error"] or f"the model {model} failed to load")
        if state is State.STOPPED:
            raise ModelUnavailable(f"the model {model} was stopped while it was starting")

    def stop(self, model: str, *, wait: bool = False) -> None:
        self._model(model).stop()
        if wait:
            self._model(model).wait_for_state(set(State) - {State.STOPPING}, self._deadline())

    def status(self, model: str) -> dict[str, Any]:
        return self._model(model).status()

    def preload(self) -> None:
        """Start the models that PRELOAD_MODELS names, but those whose plugin is left out."""
        for name in self.settings.preload_models():
            if name in self._models:
                self._models[name].start()

    def close(self) -> None:
        """Stop all models; who still runs after the grace period is left to the process's end."""
        for model in self._models.values():
            model.stop()
        give_up_at = time.monotonic() + self.settings.stop_grace_period
        for model in self._models.values():
            model.join(max(0, give_up_at - time.monotonic()))

    def _model(self, name: str) -> Model:
        self.require_model(name)
        return self._models[name]

    def _deadline(self) -> float:
        return time.monotonic() + float(self.settings.request_timeout.get())
