"""Finding the plugins: modules in the four namespace packages, imported and checked into one registry.

A plugin that fails to import or breaks its contract is left out and reported; the others work all the same.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from types import ModuleType
from typing import Any, Final

from feature_extraction_server.core.config import Config
from feature_extraction_server.core.settings import Setting, SettingsManager
from feature_extraction_server.core.task import TaskSpec

logger = logging.getLogger(__name__)

NAMESPACE: Final = "feature_extraction_server"
# Consumers come before models, whose consumer types are known by them. Apis come last: where settings clash, they fail
# and not a model, which the engine's process, without apis, would have all the same.
KINDS: Final = ("consumers", "tasks", "models", "apis")
BUILT_IN_CONSUMERS: Final = ("process_consumer", "single_thread_consumer")
_REQUIRED_FUNCTION: Final = {"consumers": "start", "tasks": "wrap", "apis": "add_routes", "models": "load_model"}


@dataclass(frozen=True)
class Plugin:
    """One discovered module, or the reason why it is left out."""

    kind: str
    name: str
    module: ModuleType | None
    error: str | None = None
    traceback: str = ""
    settings: tuple[Setting[Any], ...] = ()  # those that the plugin's add_settings declares

    @cached_property
    def version(self) -> str | None:
        """The version of the distribution that the plugin is installed from; None where it is not installed."""
        full = short = f"{NAMESPACE}-{self.kind}-{self.name}"
        if self.kind == "consumers":  # their distributions may do without the suffix
            short = full.removesuffix("_consumer")
            if self.name in BUILT_IN_CONSUMERS:
                full = short = f"{NAMESPACE}-core"
        for distribution in (full, short):
            with suppress(metadata.PackageNotFoundError):
                return metadata.version(distribution)
        return None

    def report(self) -> dict[str, str | None]:
        """Return what ``GET /api/plugins`` tells about it."""
        state = "failed" if self.module is None else "loaded"
        return {
            "kind": self.kind,
            "name": self.name,
            "version": self.version,
            "state": state,
            "error": self.error,
        }


class PluginError(Exception):
    """A plugin breaks its contract."""


@dataclass(frozen=True)
class Registry:
    """All plugins by kind and name. It does not change; ``leave_out`` gives another one."""

    plugins: tuple[Plugin, ...]

    @cached_property
    def tasks(self) -> dict[str, ModuleType]:
        return self._modules("tasks")

    @cached_property
    def models(self) -> dict[str, ModuleType]:
        return self._modules("models")

    @cached_property
    def apis(self) -> dict[str, ModuleType]:
        return self._modules("apis")

    @cached_property
    def consumers(self) -> dict[str, ModuleType]:
        return self._modules("consumers")

    @cached_property
    def errors(self) -> dict[tuple[str, str], str]:
        """The reasons of the plugins that are left out, by kind and name."""
        return {(plugin.kind, plugin.name): plugin.error for plugin in self.plugins if plugin.error is not None}

    def plugin(self, kind: str, name: str) -> Plugin:
        """Return a plugin that there is."""
        return next(plugin for plugin in self.plugins if (plugin.kind, plugin.name) == (kind, name))

    def names(self, kind: str) -> list[str]:
        """Return the names of a kind's plugins, those that are left out included."""
        return sorted(plugin.name for plugin in self.plugins if plugin.kind == kind)

    @cached_property
    def _implemented(self) -> dict[str, list[str]]:
        return {
            model: [task for task in sorted(self.tasks) if _implements(module, task)]
            for model, module in self.models.items()
        }

    def tasks_of(self, model: str) -> list[str]:
        """Return the tasks that a model implements, sorted."""
        return self._implemented[model]

    def models_for(self, task: str) -> list[str]:
        """Return the models that implement a task, sorted."""
        return [model for model in sorted(self.models) if task in self._implemented[model]]

    def spec(self, task: str) -> TaskSpec | None:
        """Return a task's declaration, or None where its ``wrap`` is written by hand."""
        declared = getattr(self.tasks[task].wrap, "__self__", None)
        return declared if isinstance(declared, TaskSpec) else None

    def config_type(self, model: str, task: str) -> type[Config] | None:
        """Return the declaration of what a model takes as ``config`` for a task, if it has one."""
        declared: type[Config] | None = getattr(self.models[model], "config_types", {}).get(task)
        return declared

    def image_size(self, model: str, task: str) -> int | None:
        """Return how many pixels the shorter side of a picture needs for a model, if it says so."""
        declared: int | None = getattr(self.models[model], "image_sizes", {}).get(task)
        return declared

    def leave_out(self, kind: str, name: str, reason: str) -> Registry:
        """Return the registry without a plugin that proved broken after discovery."""
        broken = Plugin(kind, name, None, reason)
        return Registry(tuple(broken if (p.kind, p.name) == (kind, name) else p for p in self.plugins))

    def log_failures(self) -> None:
        """Log why plugins were left out. Discovery itself runs before logging is set up."""
        for plugin in self.plugins:
            if plugin.error is not None:
                logger.error(
                    "The plugin %s.%s is left out: %s\n%s", plugin.kind, plugin.name, plugin.error, plugin.traceback
                )

    def _modules(self, kind: str) -> dict[str, ModuleType]:
        return {
            plugin.name: plugin.module for plugin in self.plugins if plugin.kind == kind and plugin.module is not None
        }


def _implements(model: ModuleType, task: str) -> bool:
    """Tell whether a model has a function for a task, and not just a helper of the core's of that name.

    A helper is to be found in its own module under the same name. What a factory there has made is not.
    """
    function = getattr(model, task, None)
    origin = str(getattr(function, "__module__", None))
    is_helper = origin.startswith(f"{NAMESPACE}.core.") and getattr(sys.modules.get(origin), task, None) is function
    return callable(function) and not is_helper


def _nothing(*_: object) -> None:
    """What a plugin does that lacks a function which it need not have."""


def discover(
    settings_manager: SettingsManager,
    kinds: Sequence[str] = KINDS,
    add_core_settings: Callable[[str, str], None] = _nothing,
) -> Registry:
    """Import and check every plugin on the path of some kinds, and let it add its settings.

    Args:
        settings_manager: holds the settings; what a plugin that fails declared is taken back.
        kinds: which kinds of plugins; in the order of ``KINDS``.
        add_core_settings: takes a plugin's kind and name, and declares the core's own settings for it. Where they
            clash with those of others, the plugin fails.
    """
    plugins: list[Plugin] = []
    models = list(_module_names("models"))  # consumers are told before it is known which of them fail
    for kind in kinds:
        consumer_types = {plugin.name for plugin in plugins if plugin.kind == "consumers" and plugin.module}
        for name in _module_names(kind):
            try:
                module = importlib.import_module(f"{NAMESPACE}.{kind}.{name}")
                _check(kind, module, consumer_types)
                with settings_manager.all_or_none():
                    add_core_settings(kind, name)
                    settings = settings_manager.declared_by(getattr(module, "add_settings", _nothing))
                    if kind == "consumers":
                        getattr(module, "add_model_settings", _nothing)(settings_manager, models)
                plugins.append(Plugin(kind, name, module, settings=settings))
            except BaseException as error:  # whatever one plugin does, SystemExit included, must not stop the server
                if isinstance(error, KeyboardInterrupt):
                    raise
                words = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
                plugins.append(Plugin(kind, name, None, words, traceback.format_exc()))
    return Registry(tuple(sorted(plugins, key=lambda plugin: (plugin.kind, plugin.name))))


def _module_names(kind: str) -> Iterator[str]:
    try:
        package = importlib.import_module(f"{NAMESPACE}.{kind}")
    except ModuleNotFoundError:
        return  # a namespace without a single plugin
    found = {module.name for module in pkgutil.iter_modules(package.__path__)}
    yield from sorted(name for name in found if not name.startswith("_"))


def _check(kind: str, module: ModuleType, consumer_types: set[str]) -> None:
    required = _REQUIRED_FUNCTION[kind]
    if not callable(getattr(module, required, None)):
        raise PluginError(f"it has no function {required}")
    if kind == "models":
        consumer_type = getattr(module, "consumer_type", None)
        known_type = isinstance(consumer_type, str) and consumer_type in consumer_types
        if consumer_type is not None and not known_type:
            known = ", ".join(sorted(consumer_types))
            raise PluginError(f"its consumer_type {consumer_type!r} is unknown; there are {known}")
