"""The server's own settings, declared once the plugins are known, because some of them name plugins."""

from __future__ import annotations

from typing import Any, Final

from feature_extraction_server.core.errors import SettingError
from feature_extraction_server.core.model import ModelOptions
from feature_extraction_server.core.plugins import Registry
from feature_extraction_server.core.settings import Setting, SettingsManager
from feature_extraction_server.core.task import Limits

#: Longer than anybody waits, and short enough for every clock and timer.
MAX_SECONDS: Final = 1e8


class ServerSettings:
    """Declares the core's settings and gives their values as what the rest of the core works with.

    A default may name a plugin that is left out: the server starts all the same, and requests get the reason.
    """

    def __init__(self, settings: SettingsManager, registry: Registry) -> None:
        add = settings.add_setting
        self._registry = registry
        broken_models = [name for kind, name in registry.errors if kind == "models"]
        self._preload = add(
            name="PRELOAD_MODELS", type=str, default="", description="Models to start at boot, separated by commas"
        )
        self._known_models = registry.names("models")
        self.default_task: Setting[str] = add(
            name="DEFAULT_TASK",
            type=str,
            default=None,
            choices=registry.names("tasks"),
            description="The task that is assumed where a request's task cannot be inferred otherwise",
        )
        self._default_models = {
            task: add(
                name=f"DEFAULT_MODEL_{task.upper()}",
                type=str,
                default=None,
                choices=sorted(registry.models_for(task) + broken_models),
                description=f"The model that is assumed for the task {task} where a request names none",
            )
            for task in sorted(registry.tasks)
        }
        self._default_consumer_type = add(
            name="DEFAULT_CONSUMER_TYPE",
            type=str,
            default="single_thread_consumer",
            choices=sorted(registry.consumers),
            description="The consumer type of models that do not specify one",
        )
        self._consumer_types = {
            model: add(
                name=f"{model.upper()}_CONSUMER_TYPE",
                type=str,
                default=None,
                choices=sorted(registry.consumers),
                description=f"The consumer type of the model {model}, in place of what the model itself specifies",
            )
            for model in sorted(registry.models)
        }
        self._n_replicas = {
            model: add(
                name=f"MODEL_REPLICAS_{model.upper()}",
                type=int,
                default=1,
                minimum=1,
                description=f"Processes of the model {model}, which share its queue; for process_consumer",
            )
            for model in sorted(registry.models)
        }
        self.request_timeout: Setting[float] = add(
            name="REQUEST_TIMEOUT",
            type=float,
            default=600.0,
            minimum=0.001,
            maximum=MAX_SECONDS,
            description="Seconds after which a request is answered with an error, loading included",
        )
        self.max_loaded_models: Setting[int] = add(
            name="MAX_LOADED_MODELS",
            type=int,
            default=0,
            minimum=0,
            description="Models that may be loaded at a time: the one idle longest makes room; 0 means any number",
        )
        self.max_content_length: Setting[int] = add(
            name="MAX_CONTENT_LENGTH",
            type=int,
            default=256 * 1024 * 1024,
            minimum=1,
            description="Bytes that the body of a request may have",
        )
        self._options = self._add_model_options(settings)
        self._limits = self._add_limits(settings)

    @staticmethod
    def _add_model_options(settings: SettingsManager) -> dict[str, Setting[Any]]:
        defaults, add = ModelOptions(), settings.add_setting
        return {
            "result_check_interval": add(
                name="RESULT_CHECK_INTERVAL",
                type=float,
                default=defaults.result_check_interval,
                minimum=0.001,
                maximum=MAX_SECONDS,
                description="Seconds between checks, while a request waits, that its model's consumer and its client "
                "are still there; a result is handed over at once, whatever this is",
            ),
            "max_queue_size": add(
                name="MAX_QUEUE_SIZE",
                type=int,
                default=defaults.max_queue_size,
                minimum=1,
                description="Jobs that may wait for one model; more are refused",
            ),
            "max_batch_size": add(
                name="MAX_BATCH_SIZE",
                type=int,
                default=defaults.max_batch_size,
                minimum=1,
                description="Items that one call of a model may have",
            ),
            "stop_grace_period": add(
                name="STOP_GRACE_PERIOD",
                type=float,
                default=defaults.stop_grace_period,
                minimum=0,
                maximum=MAX_SECONDS,
                description="Seconds that the accepted jobs of a stopped model may take to finish",
            ),
            "load_retry_delay": add(
                name="LOAD_RETRY_DELAY",
                type=float,
                default=defaults.load_retry_delay,
                minimum=0,
                maximum=MAX_SECONDS,
                description="Seconds before a request makes a model that failed to load try again",
            ),
            "idle_timeout": add(
                name="MODEL_IDLE_TIMEOUT",
                type=float,
                default=float(defaults.idle_timeout),
                minimum=0,
                maximum=MAX_SECONDS,
                description="Seconds without a request after which a model is stopped; 0 means never",
            ),
        }

    @staticmethod
    def _add_limits(settings: SettingsManager) -> dict[str, Setting[Any]]:
        defaults, add = Limits(), settings.add_setting
        return {
            "max_image_pixels": add(
                name="MAX_IMAGE_PIXELS",
                type=int,
                default=defaults.max_image_pixels,
                minimum=1,
                description="Pixels that an image may have",
            ),
            "max_audio_seconds": add(
                name="MAX_AUDIO_SECONDS",
                type=float,
                default=float(defaults.max_audio_seconds),
                minimum=0.001,
                maximum=MAX_SECONDS,
                description="Seconds that a recording may have",
            ),
            "max_items": add(
                name="MAX_ITEMS",
                type=int,
                default=defaults.max_items,
                minimum=1,
                description="Items that a list in a request may have",
            ),
        }

    def default_model(self, task: str) -> str | None:
        """Return the configured default model of a task."""
        name: str | None = self._default_models[task].get()
        return name

    def consumer_type(self, model: str) -> str:
        """Return which consumer runs a model: as set for it, as the model specifies, or the default."""
        own = getattr(self._registry.models[model], "consumer_type", None)
        return str(self._consumer_types[model].get() or own or self._default_consumer_type.get())

    def model_options(self, model: str) -> ModelOptions:
        """Return how a model is run."""
        options = {name: setting.get() for name, setting in self._options.items()}
        return ModelOptions(n_replicas=self._n_replicas[model].get(), **options)

    @property
    def result_check_interval(self) -> float:
        """Seconds between checks, while a request waits, that its result is still to be had and wanted."""
        return float(self._options["result_check_interval"].get())

    @property
    def stop_grace_period(self) -> float:
        """Seconds that the accepted jobs of a stopped model may take to finish."""
        return float(self._options["stop_grace_period"].get())

    def limits(self) -> Limits:
        """Return what one request may ask for."""
        return Limits(**{name: setting.get() for name, setting in self._limits.items()})

    def preload_models(self) -> list[str]:
        """Return the models to start at boot.

        Raises:
            SettingError: it names a model that there is not.
        """
        names = [name.strip() for name in self._preload.get().split(",") if name.strip()]
        for name in names:
            if name not in self._known_models:
                known = ", ".join(self._known_models) or "none"
                raise SettingError(
                    f"PRELOAD_MODELS={self._preload.get()!r} is not allowed: there is no model {name!r}; "
                    f"it must be a comma-separated list of {known}"
                )
        return names
