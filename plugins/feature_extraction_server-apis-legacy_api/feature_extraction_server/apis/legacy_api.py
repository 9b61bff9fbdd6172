"""The legacy API: ``/extract``, ``/load``, ``/free`` and ``/tasks``, each also below ``/legacy``."""

from typing import Any

from flask import Flask, Response, jsonify, request

from feature_extraction_server.core.application import ApplicationInterface
from feature_extraction_server.core.describe import default_model, input_schema
from feature_extraction_server.core.errors import InvalidInput
from feature_extraction_server.flask.app import client_waits
from feature_extraction_server.flask.openapi import (
    RUN_ERRORS,
    JsonObject,
    json_body,
    json_response,
    operation,
    task_example,
)
from feature_extraction_server.flask.request_body import read_form, read_json_object

TAG = "legacy API"


def add_routes(application_interface: ApplicationInterface, flask_app: Flask) -> None:
    """Add the routes; the README lists them."""

    def extract() -> Response:
        task, model, payload = _read_input(application_interface)
        return jsonify(application_interface.run(task, model, payload, is_wanted=client_waits()))

    def load() -> dict[str, str]:
        application_interface.start(_named_model(), wait=True)
        return {"status": "ok"}

    def free() -> dict[str, str]:
        application_interface.stop(_named_model(), wait=True)
        return {"status": "ok"}

    def tasks() -> Response:
        return jsonify(application_interface.list_tasks())

    def _named_model() -> str:
        body = read_json_object()
        task, model = _pop_name(body, "task"), _pop_name(body, "model")
        for key in body:
            raise InvalidInput(f"unknown key {key[:40]!r}: this route takes task and model", field=key[:40])
        if model is None or task is not None:
            _, model = application_interface.resolve(task, model)
        application_interface.require_model(model)
        return model

    for prefix in ("", "/legacy"):
        flask_app.add_url_rule(f"{prefix}/extract", f"legacy_api extract {prefix}", extract, methods=["POST"])
        flask_app.add_url_rule(f"{prefix}/load", f"legacy_api load {prefix}", load, methods=["POST"])
        flask_app.add_url_rule(f"{prefix}/free", f"legacy_api free {prefix}", free, methods=["POST"])
        flask_app.add_url_rule(f"{prefix}/tasks", f"legacy_api tasks {prefix}", tasks, methods=["GET"])


def _read_input(application: ApplicationInterface) -> tuple[str | None, str | None, dict[str, Any]]:
    """Return the task, the model and the task's input. The names are keys of the object, the form or the query."""
    if request.is_json:
        body = read_json_object()
        return _pop_name(body, "task"), _pop_name(body, "model"), body
    form = read_form(application)
    task, model = application.resolve(form.pop_text("task"), form.pop_text("model"))
    return task, model, form.to_input(task, application.registry.spec(task))


def _pop_name(body: dict[str, Any], key: str) -> str | None:
    """Take a task's or a model's name out of the body; absent and null mean the default."""
    name = body.pop(key, None)
    if name is not None and not isinstance(name, str):
        raise InvalidInput(f"{key} must be a string", field=key)
    return name


def describe_routes(application_interface: ApplicationInterface) -> dict[str, Any]:
    """Return the OpenAPI description of the routes."""
    paths: dict[str, Any] = {}
    for prefix in ("", "/legacy"):
        paths |= {f"{prefix}{path}": item for path, item in _paths(application_interface, prefix.strip("/")).items()}
    return paths


def _paths(application: ApplicationInterface, prefix: str) -> dict[str, Any]:
    def described(summary: str, name: str, **parts: Any) -> JsonObject:
        operation_id = "_".join(filter(None, ("legacy_api", prefix, name)))
        return operation(summary, tag=TAG, operation_id=operation_id, **parts)

    tasks = application.list_tasks()
    inputs = [_with_names(application, task) for task in tasks]
    outputs = [{"$ref": f"#/components/schemas/{task}.output"} for task in tasks]
    choices = [(task, model) for task in tasks for model in application.models_for(task)[:1]]
    examples = [{"task": task, "model": model} | task_example(application, task) for task, model in choices]
    models = [{"model": model} for model in application.list_models()]
    model = json_body({"anyOf": _names(application)}, next(iter(models), None))
    done = json_response("It is done", {"type": "object", "properties": {"status": {"const": "ok"}}}, {"status": "ok"})
    names = json_response("Names, sorted", {"type": "array", "items": {"type": "string"}}, tasks)
    return {
        "/extract": {
            "post": described(
                "Run a task on its input",
                "extract",
                body=json_body({"anyOf": inputs}, next(iter(examples), None)),
                answer=json_response("The task's result", {"anyOf": outputs}),
                errors=RUN_ERRORS,
            )
        },
        "/load": {"post": described("Start a model and wait", "load", body=model, answer=done, errors=RUN_ERRORS)},
        "/free": {"post": described("Stop a model and wait", "free", body=model, answer=done, errors=RUN_ERRORS)},
        "/tasks": {"get": described("All tasks", "tasks", answer=names)},
    }


def _with_names(application: ApplicationInterface, task: str) -> JsonObject:
    """Return the schema of a task's input with the keys ``task`` and ``model``, required where nothing decides them."""
    schema = input_schema(application.registry, task)
    task_is_default = application.settings.default_task.get() == task or application.list_tasks() == [task]
    model_is_default = default_model(application, task) is not None
    names = {
        "task": {"enum": [task, None] if task_is_default else [task]},
        "model": {"enum": application.models_for(task) + ([None] if model_is_default else [])},
    }
    required = ([] if task_is_default else ["task"]) + ([] if model_is_default else ["model"])
    return schema | {"properties": names | schema["properties"], "required": required + schema["required"]}


def _names(application: ApplicationInterface) -> list[JsonObject]:
    """Return the schemas of the bodies that name a model, by itself or as a task's default."""
    tasks = application.list_tasks()
    decided = [task for task in tasks if default_model(application, task) is not None]
    by_model = {"model": {"enum": application.list_models()}, "task": {"enum": [*tasks, None]}}
    by_task = {"task": {"enum": decided}, "model": {"type": "null"}}
    schemas = [_exactly(by_model, ["model"])]
    if decided:
        schemas.append(_exactly(by_task, ["task"]))
    if application.settings.default_task.get() in decided or (decided and decided == tasks[:1] == tasks):
        schemas.append(_exactly({"task": {"type": "null"}, "model": {"type": "null"}}, []))
    return schemas


def _exactly(properties: JsonObject, required: list[str]) -> JsonObject:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
