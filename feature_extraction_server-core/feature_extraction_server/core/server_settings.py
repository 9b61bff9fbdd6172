"""The server's own settings. They are declared before the plugins' own; some of them name plugins or belong to one."""

from __future__ import annotations

import re
from typing import Any, Final

from feature_extraction_server.core.errors import SettingError
from feature_extraction_server.core.model import ModelOptions
from feature_extraction_server.core.plugins import Registry
from feature_extraction_server.core.settings import Setting, SettingsManager
from feature_extraction_server.core.task import Limits
from feature_extraction_server.core.url_fetch import UrlFetcher, plain_host

#: Longer than anybody waits, and short enough for every clock and timer.
MAX_SECONDS: Final = 1e8
_KEY: Final = re.compile(r"[!-~]+")
_ORIGIN: Final = re.compile(r"\*|[a-z][a-z0-9+.-]*://[a-z0-9.\-\[\]:]+")


class ServerSettings:
    """Declares the core's settings and gives their values as what the rest of the core works with.

    Whoever discovers the plugins calls ``add_settings_of_plugin`` for each, then ``allow_plugins`` once. A default may
    name a plugin that is left out: the server starts all the same, and requests get the reason.
    """

    def __init__(self, settings: SettingsManager) -> None:
        self._add = add = settings.add_setting
        self._registry = Registry(())
        self._default_models: dict[str, Setting[str]] = {}
        self._consumer_types: dict[str, Setting[str]] = {}
        self._n_replicas: dict[str, Setting[int]] = {}
        self._preload = add(
            name="PRELOAD_MODELS", type=str, default="", description="Models to start at boot, separated by commas"
        )
        self.default_task: Setting[str] = add(
            name="DEFAULT_TASK",
            type=str,
            default=None,
            description="The task that is assumed where a request's task cannot be inferred otherwise",
        )
        self._default_consumer_type: Setting[str] = add(
            name="DEFAULT_CONSUMER_TYPE",
            type=str,
            default="single_thread_consumer",
            description="The consumer type of models that do not specify one",
        )
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
        self.result_cache_bytes: Setting[int] = add(
            name="RESULT_CACHE_BYTES",
            type=int,
            default=0,
            minimum=0,
            description="Bytes of answers that are kept in memory, to answer the same input once more without the "
            "model; 0 means none",
        )
        self.access_log: Setting[bool] = add(
            name="ACCESS_LOG", type=bool, default=False, description="Whether every request is logged"
        )
        self._api_keys: Setting[str] = add(
            name="API_KEYS",
            type=str,
            default="",
            secret=True,
            description="Keys (bearer tokens), separated by commas, of which every request must have one, but for "
            "health checks, the pages themselves and openapi.json; without a key here, anybody may ask",
        )
        self._cors_origins: Setting[str] = add(
            name="CORS_ORIGINS",
            type=str,
            default="",
            description="Origins (as in https://example.org), separated by commas, whose pages may use the server; "
            "* means any",
        )
        self.rate_limit: Setting[float] = add(
            name="RATE_LIMIT",
            type=float,
            default=0.0,
            minimum=0,
            maximum=1e6,
            description="Requests a second that each API key, or each address where there are no keys, may send to "
            "each web worker; 0 means any number",
        )
        self.rate_limit_burst: Setting[int] = add(
            name="RATE_LIMIT_BURST",
            type=int,
            default=20,
            minimum=1,
            description="Requests that may come at once where there is a RATE_LIMIT",
        )
        self._allowed_url_hosts: Setting[str] = add(
            name="ALLOWED_URL_HOSTS",
            type=str,
            default="",
            description="Hosts that files which requests name by URL may be fetched from, separated by commas; * means "
            "any public host; without a host, no file is fetched",
        )
        self._url_timeout: Setting[float] = add(
            name="URL_TIMEOUT",
            type=float,
            default=30.0,
            minimum=0.001,
            maximum=MAX_SECONDS,
            description="Seconds that fetching the files which a request names by URL may take",
        )
        self._options = self._add_model_options(settings)
        self._limits = self._add_limits(settings)
        self.draft_decoding: Setting[bool] = add(
            name="DRAFT_DECODING",
            type=bool,
            default=False,
            description="Whether JPEGs much larger than a model's input are decoded at 1/2, 1/4 or 1/8 of their size: "
            "faster, but answers change a little",
        )

    def add_settings_of_plugin(self, kind: str, name: str) -> None:
        """Declare what is set for one task or one model.

        Raises:
            ValueError: there is a different setting of such a name.
        """
        if kind == "tasks":
            self._default_models[name] = self._add(
                name=f"DEFAULT_MODEL_{name.upper()}",
                type=str,
                default=None,
                description=f"The model that is assumed for the task {name} where a request names none",
            )
        elif kind == "models":
            self._consumer_types[name] = self._add(
                name=f"{name.upper()}_CONSUMER_TYPE",
                type=str,
                default=None,
                description=f"The consumer type of the model {name}, in place of what the model itself specifies",
            )
            self._n_replicas[name] = self._add(
                name=f"MODEL_REPLICAS_{name.upper()}",
                type=int,
                default=1,
                minimum=1,
                description=f"Processes of the model {name}, which share its queue; for process_consumer",
            )

    def allow_plugins(self, registry: Registry) -> None:
        """Let settings that name plugins name those that there are."""
        self._registry = registry
        self.default_task.choices = registry.names("tasks")
        broken_models = [name for kind, name in registry.errors if kind == "models"]
        for task, setting in self._default_models.items():
            setting.choices = sorted(registry.models_for(task) + broken_models)
        for setting in (self._default_consumer_type, *self._consumer_types.values()):
            setting.choices = sorted(registry.consumers)

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
                "are still there; longer where hundreds wait; a result is handed over at once, whatever this is",
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
                description="Items that one call of a model may have; about as many wait decoded",
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
                description="Seconds before a request makes a model that failed to load try again; one of "
                "PRELOAD_MODELS does so by itself",
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
            "max_decoded_bytes": add(
                name="MAX_DECODED_BYTES",
                type=int,
                default=defaults.max_decoded_bytes,
                minimum=1,
                description="Bytes that all pictures (4 a pixel) and recordings (4 a sample, 16,000 samples a second "
                "at least) of a request may take in memory together",
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
        """Return what one request may ask for.

        Raises:
            SettingError: ALLOWED_URL_HOSTS holds what is no host name.
        """
        urls = UrlFetcher(
            allowed_hosts=self._parse_hosts(),
            max_bytes=self.max_content_length.get(),
            timeout_s=min(self._url_timeout.get(), self.request_timeout.get()),
        )
        return Limits(**{name: setting.get() for name, setting in self._limits.items()}, urls=urls)

    def _parse_hosts(self) -> frozenset[str]:
        names = [name.strip() for name in self._allowed_url_hosts.get().split(",") if name.strip()]
        hosts: set[str] = set()
        for name in names:
            try:
                hosts.add(name if name == "*" else plain_host(name))
            except ValueError:
                raise SettingError(
                    f"ALLOWED_URL_HOSTS={self._allowed_url_hosts.get()!r} is not allowed: {name!r} is no host name; "
                    "it must be * or a comma-separated list of host names, without https:// and without ports"
                ) from None
        return frozenset(hosts)

    def api_keys(self) -> list[str]:
        """Return the keys of which each request must have one; none where anybody may ask.

        Raises:
            SettingError: there is one that no request could have.
        """
        keys = [key.strip() for key in self._api_keys.get().split(",") if key.strip()]
        if not all(_KEY.fullmatch(key) for key in keys):
            raise SettingError(
                "API_KEYS has a value that is not allowed: it must be a comma-separated list of keys of printable "
                "characters of ASCII, without spaces"
            )
        return keys

    def cors_origins(self) -> frozenset[str]:
        """Return the origins whose pages may use the server.

        Raises:
            SettingError: CORS_ORIGINS holds what is no origin.
        """
        origins = frozenset(origin.strip() for origin in self._cors_origins.get().split(",") if origin.strip())
        for origin in sorted(origins):
            if not _ORIGIN.fullmatch(origin):
                raise SettingError(
                    f"CORS_ORIGINS={self._cors_origins.get()!r} is not allowed: {origin!r} is no origin; it must be * "
                    "or a comma-separated list of origins as browsers send them: https://example.org, without a path "
                    "and in lower case"
                )
        return origins

    def preload_models(self) -> list[str]:
        """Return the models to start at boot.

        Raises:
            SettingError: it names a model that there is not.
        """
        names = [name.strip() for name in self._preload.get().split(",") if name.strip()]
        models = self._registry.names("models")
        for name in names:
            if name not in models:
                known = ", ".join(models) or "none"
                raise SettingError(
                    f"PRELOAD_MODELS={self._preload.get()!r} is not allowed: there is no model {name!r}; "
                    f"it must be a comma-separated list of {known}"
                )
        return names
