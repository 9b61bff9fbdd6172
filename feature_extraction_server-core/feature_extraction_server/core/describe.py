"""What clients are told about a task and a model: what it does, what it takes and gives, how it is set."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter

from feature_extraction_server.core.application import ApplicationInterface
from feature_extraction_server.core.errors import NoDefault
from feature_extraction_server.core.plugins import Registry
from feature_extraction_server.core.settings import Setting
from feature_extraction_server.core.task import JsonSchema

logger = logging.getLogger(__name__)


def describe_task(application: ApplicationInterface, task: str) -> dict[str, Any]:
    """Return what there is to know about a task, JSON-ready.

    Raises:
        TaskNotFound: there is no such task.
    """
    application.require_task(task)
    registry = application.registry
    spec = registry.spec(task)
    return {
        "task": task,
        "description": task_description(registry, task),
        "version": registry.plugin("tasks", task).version,
        "input": input_schema(registry, task),
        "output": output_schema(registry, task),
        "batch_fields": list(spec.batch_fields) if spec else [],
        "models": application.models_for(task),
        "default_model": default_model(application, task),
    }


def describe_model(application: ApplicationInterface, model: str) -> dict[str, Any]:
    """Return what there is to know about a model, its status included, JSON-ready.

    Raises:
        ModelNotFound: there is no such model.
    """
    status = application.status(model)
    registry = application.registry
    plugin = registry.plugin("models", model)
    tasks = registry.tasks_of(model)
    config_types = {task: registry.config_type(model, task) for task in tasks}
    return status | {
        "description": inspect.getdoc(plugin.module) or "",
        "version": plugin.version,
        "tasks": tasks,
        "config": {task: kind.model_json_schema() if kind else None for task, kind in config_types.items()},
        "settings": [_describe_setting(setting) for setting in plugin.settings],
    }


def task_description(registry: Registry, task: str) -> str:
    """Return what a task does: its declared description or its module's docstring."""
    spec = registry.spec(task)
    return spec.description if spec is not None else inspect.getdoc(registry.tasks[task]) or ""


def input_schema(registry: Registry, task: str) -> JsonSchema:
    """Return the JSON schema of a task's input. Of a hand-written task, it holds what its signature tells."""
    spec = registry.spec(task)
    if spec is not None:
        return spec.input_schema()
    properties: JsonSchema = {}
    required: list[str] = []
    takes_any = False
    for parameter in _signature(registry.tasks[task].wrap).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_any = True
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            properties[parameter.name] = _schema_of_annotation(parameter.annotation)
            if parameter.default is parameter.empty:
                required.append(parameter.name)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": takes_any}


def output_schema(registry: Registry, task: str) -> JsonSchema:
    """Return the JSON schema of a task's answer; an empty one, which says nothing, where it is not declared."""
    spec = registry.spec(task)
    if spec is not None:
        return spec.output_schema()
    return _schema_of_annotation(_signature(registry.tasks[task].wrap).return_annotation)


def default_model(application: ApplicationInterface, task: str) -> str | None:
    """Return the model that runs a task where a request names none; None where that is not decided."""
    try:
        return application.resolve(task, None)[1]
    except NoDefault:
        return None


def _signature(wrap: Callable[..., Callable[..., Any]]) -> inspect.Signature:
    """Return the signature of a hand-written task's public function."""

    def function(*positional: Any, **arguments: Any) -> None: ...

    try:
        return inspect.signature(wrap(function), follow_wrapped=False, eval_str=True)
    except Exception as error:  # whatever a plugin's wrap does, the others must be described
        logger.warning("The signature of a task's %r cannot be read: %r", wrap, error)
        return inspect.Signature([inspect.Parameter("input", inspect.Parameter.VAR_KEYWORD)])


def _schema_of_annotation(annotation: Any) -> JsonSchema:
    if annotation in (inspect.Parameter.empty, Any):
        return {}
    try:
        return TypeAdapter(annotation).json_schema()
    except Exception:  # an annotation that is no JSON type tells nothing
        return {}


def _describe_setting(setting: Setting[Any]) -> dict[str, Any]:
    return {
        "name": setting.name,
        "description": setting.description,
        "value": None if setting.is_secret else setting.get(),
        "default": None if setting.is_secret else setting.default,
        "allowed": setting.allowed(),
        "secret": setting.is_secret,
    }
