"""The settings of models on a Ray cluster, each of which may be given for one model alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from feature_extraction_server.core.errors import SettingError
from feature_extraction_server.core.settings import Setting, SettingsManager

ADDRESS: Final = "RAY_ADDRESS"
_MAX_REPLICAS: Final = 10_000
_GENERAL: dict[str, Setting[Any]] = {}
_OF_MODELS: dict[str, dict[str, Setting[Any]]] = {}


@dataclass(frozen=True)
class Demand:
    """What a model asks of the cluster."""

    min_replicas: int
    max_replicas: int
    num_cpus: float
    num_gpus: float
    resources: dict[str, float]

    def of_a_replica(self) -> dict[str, float]:
        """Return what one replica takes of a node, as Ray names it."""
        asked = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}
        return {name: amount for name, amount in asked.items() if amount}


def add_settings(settings_manager: SettingsManager) -> None:
    """Declare what holds for the cluster and for all models."""
    add = settings_manager.add_setting
    _GENERAL.clear()
    _OF_MODELS.clear()
    _GENERAL[ADDRESS] = add(
        name=ADDRESS,
        type=str,
        default=None,
        pattern=r"auto|[^\s:/]+:\d+",
        description="The Ray cluster that models with the ray_consumer run on (as in 10.0.0.1:6379; auto: the one that "
        "this machine belongs to); without it, one is started on this machine",
    )
    _GENERAL["RAY_APP_PREFIX"] = add(
        name="RAY_APP_PREFIX",
        type=str,
        default="fes",
        pattern=r"[A-Za-z0-9_-]+",
        description="What the names of models on the Ray cluster begin with; servers with the same one share them",
    )
    _GENERAL["RAY_SHIP_PLUGINS"] = add(
        name="RAY_SHIP_PLUGINS",
        type=bool,
        default=False,
        description="Whether the core and the plugins are sent to the Ray cluster's nodes from this server's own "
        "installation; what they depend on is not",
    )
    _GENERAL["RAY_PLACEMENT_TIMEOUT"] = add(
        name="RAY_PLACEMENT_TIMEOUT",
        type=float,
        default=30.0,
        minimum=0,
        maximum=1e8,
        description="Seconds that a model waits for a node of the Ray cluster that has room for it",
    )
    for name, declaration in _declarations().items():
        _GENERAL[name] = add(name=name, **declaration)
    settings_manager.add_check(check)


def add_model_settings(settings_manager: SettingsManager, models: Sequence[str]) -> None:
    """Declare what holds for one model each, in place of what holds for all."""
    for model in models:
        _OF_MODELS[model] = {
            name: settings_manager.add_setting(
                name=f"{name}_{model.upper()}",
                **declaration
                | {"default": None, "description": f"{name} of the model {model}, in place of what holds for all"},
            )
            for name, declaration in _declarations().items()
        }


def _declarations() -> dict[str, dict[str, Any]]:
    return {
        "RAY_MIN_REPLICAS": {
            "type": int,
            "default": 1,
            "minimum": 0,
            "maximum": _MAX_REPLICAS,
            "description": "Replicas that a model on a Ray cluster has at least; 0: none while nobody asks for any",
        },
        "RAY_MAX_REPLICAS": {
            "type": int,
            "default": 1,
            "minimum": 1,
            "maximum": _MAX_REPLICAS,
            "description": "Replicas that a model on a Ray cluster has at most, where those that there are are busy",
        },
        "RAY_NUM_CPUS": {
            "type": float,
            "default": 1.0,
            "minimum": 0,
            "maximum": 1e4,
            "description": "Cores of its node that a replica takes",
        },
        "RAY_NUM_GPUS": {
            "type": float,
            "default": 0.0,
            "minimum": 0,
            "maximum": 1e4,
            "description": "GPUs of its node that a replica takes; several may share one (0.5)",
        },
        "RAY_RESOURCES": {
            "type": str,
            "default": "{}",
            "description": 'Further resources of its node that a replica takes, as JSON (as in {"big_memory": 1})',
        },
    }


def general(name: str) -> Any:
    """Return the value of a setting that holds for all models."""
    return _GENERAL[name].get()


def demand(model: str) -> Demand:
    """Return what a model asks of the cluster.

    Raises:
        SettingError: two settings contradict each other, or RAY_RESOURCES is not as it must be.
    """
    values = {name: _value(name, model) for name in _declarations()}
    minimum, maximum = values["RAY_MIN_REPLICAS"], values["RAY_MAX_REPLICAS"]
    if minimum > maximum:
        name = _source("RAY_MIN_REPLICAS", model).name
        raise SettingError(f"{name}={minimum} is not allowed: it must be at most RAY_MAX_REPLICAS, which is {maximum}")
    return Demand(minimum, maximum, values["RAY_NUM_CPUS"], values["RAY_NUM_GPUS"], _resources(model))


def check() -> None:
    """Look closer at the values than parsing does.

    Raises:
        SettingError: one is not allowed.
    """
    for model in _OF_MODELS:
        demand(model)


def _source(name: str, model: str) -> Setting[Any]:
    own = _OF_MODELS.get(model, {}).get(name)
    return own if own is not None and own.get() is not None else _GENERAL[name]


def _value(name: str, model: str) -> Any:
    return _source(name, model).get()


def _resources(model: str) -> dict[str, float]:
    setting = _source("RAY_RESOURCES", model)
    try:
        told = json.loads(setting.get())
        amounts = {name: float(amount) for name, amount in told.items() if not isinstance(amount, (bool, str))}
        if amounts.keys() == told.keys() and all(0 <= amount < 1e9 for amount in amounts.values()):
            return {name: amount for name, amount in amounts.items() if name not in ("CPU", "GPU")}
    except (ValueError, TypeError, AttributeError):
        pass
    raise SettingError(
        f"{setting.name}={setting.get()!r} is not allowed: it must be a JSON object of names and numbers, as in "
        '{"big_memory": 1}'
    )
