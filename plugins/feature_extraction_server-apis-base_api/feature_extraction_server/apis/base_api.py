"""The base API: tasks, models and features below ``/api``."""

from functools import partial
from typing import Any

from flask import Flask, Response, jsonify

from feature_extraction_server.core.application import ApplicationInterface
from feature_extraction_server.core.describe import describe_model, describe_task, task_description
from feature_extraction_server.flask.app import client_waits
from feature_extraction_server.flask.meta import (
    META_PARAMETER,
    META_SCHEMA,
    PARAMETER,
    PREFER_HEADER,
    PREFERENCE,
    PROVENANCE_PROPERTIES,
    wants_meta,
    with_meta,
)
from feature_extraction_server.flask.openapi import (
    RUN_ERRORS,
    JsonObject,
    json_response,
    model_parameter,
    operation,
    task_answer,
    task_body,
    task_parameter,
)
from feature_extraction_server.flask.request_body import read_task_input

TAG = "base API"
STATES = ["stopped", "starting", "loading", "running", "stopping", "failed"]


def add_routes(application_interface: ApplicationInterface, flask_app: Flask) -> None:
    """Add the routes; the README lists them."""

    def features(task: str, model: str | None = None) -> Response:
        application_interface.resolve(task, model)  # an unknown name is told before the body is read
        asks_for_meta = wants_meta()
        payload = read_task_input(application_interface, task, reserved=(PARAMETER,))
        run = partial(application_interface.run, task, model, payload, is_wanted=client_waits())
        return with_meta(application_interface, run) if asks_for_meta else jsonify(run())

    def start(model: str) -> dict[str, str]:
        application_interface.start(model)
        return {"status": "ok"}

    def stop(model: str) -> dict[str, str]:
        application_interface.stop(model)
        return {"status": "ok"}

    def status(model: str) -> dict[str, Any]:
        return application_interface.status(model)

    def add(rule: str, view: Any, method: str) -> None:
        flask_app.add_url_rule(rule, f"base_api {method} {rule}", view, methods=[method])

    add("/api/tasks/list", lambda: jsonify(application_interface.list_tasks()), "GET")
    add("/api/models/list", lambda: jsonify(application_interface.list_models()), "GET")
    add("/api/models/<model>/tasks/list", lambda model: jsonify(application_interface.tasks_of(model)), "GET")
    add("/api/tasks/<task>/models/list", lambda task: jsonify(application_interface.models_for(task)), "GET")
    add("/api/tasks/<task>", lambda task: jsonify(describe_task(application_interface, task)), "GET")
    add("/api/models/<model>", lambda model: jsonify(describe_model(application_interface, model)), "GET")
    add("/api/plugins", lambda: jsonify(application_interface.list_plugins()), "GET")
    add("/api/models/<model>/tasks/<task>/features", features, "POST")
    add("/api/tasks/<task>/models/<model>/features", features, "POST")
    add("/api/tasks/<task>/features", features, "POST")
    add("/api/models/<model>/start", start, "POST")
    add("/api/models/<model>/stop", stop, "POST")
    add("/api/models/<model>/status", status, "GET")


def describe_routes(application_interface: ApplicationInterface) -> dict[str, Any]:
    """Return the OpenAPI description of the routes: those that run a task once for each task."""
    paths = _lists(application_interface) | _models(application_interface)
    for task in application_interface.list_tasks():
        paths |= _features(application_interface, task)
    return paths


def _lists(application: ApplicationInterface) -> dict[str, Any]:
    def names(summary: str, operation_id: str, example: list[str], *parameters: JsonObject) -> JsonObject:
        schema = {"type": "array", "items": {"type": "string"}}
        errors = (404, 500) if parameters else (500,)
        answer = json_response("Names, sorted", schema, example)
        return {
            "get": operation(
                summary, tag=TAG, operation_id=operation_id, answer=answer, errors=errors, parameters=parameters
            )
        }

    tasks, models = application.list_tasks(), application.list_models()
    task, model = task_parameter(application), model_parameter(application)
    plugins = operation(
        "All plugins, and why some were left out",
        tag=TAG,
        operation_id="base_api_plugins",
        answer=json_response("All plugins", {"type": "array", "items": _PLUGIN}, [_PLUGIN_EXAMPLE]),
    )
    return {
        "/api/tasks/list": names("All tasks", "base_api_tasks", tasks),
        "/api/models/list": names("All models", "base_api_models", models),
        "/api/models/{model}/tasks/list": names("The tasks that a model implements", "base_api_tasks_of", tasks, model),
        "/api/tasks/{task}/models/list": names("The models that implement a task", "base_api_models_for", models, task),
        "/api/plugins": {"get": plugins},
    }


def _models(application: ApplicationInterface) -> dict[str, Any]:
    def about(
        summary: str,
        name: str,
        answer: JsonObject,
        parameter: JsonObject,
        errors: tuple[int, ...] = (404, 500, 503, 504),
    ) -> JsonObject:
        return operation(
            summary, tag=TAG, operation_id=f"base_api_{name}", answer=answer, errors=errors, parameters=[parameter]
        )

    task, model = task_parameter(application), model_parameter(application)
    example = next((describe_task(application, name) for name in application.list_tasks()), None)
    done = json_response("The server has taken note", _OK, {"status": "ok"})
    return {
        "/api/tasks/{task}": {
            "get": about(
                "What a task takes and gives", "task", json_response("The task", _TASK, example), task, (404, 500)
            )
        },
        "/api/models/{model}": {
            "get": about(
                "What a model does, how it is set, and its state",
                "model",
                json_response("It", _MODEL, _MODEL_EXAMPLE),
                model,
            )
        },
        "/api/models/{model}/status": {
            "get": about("A model's state", "status", json_response("Its state", _STATUS, _STATUS_EXAMPLE), model)
        },
        "/api/models/{model}/start": {"post": about("Start a model; answers at once", "start", done, model)},
        "/api/models/{model}/stop": {
            "post": about("Stop a model; answers at once, accepted requests may finish", "stop", done, model)
        },
    }


def _features(application: ApplicationInterface, task: str) -> dict[str, Any]:
    def features(by: str, parameters: list[JsonObject]) -> JsonObject:
        return {
            "post": operation(
                task_description(application.registry, task).partition("\n")[0],
                tag=task,
                operation_id=f"base_api_{task}{by}",
                answer=_features_answer(application, task),
                errors=RUN_ERRORS,
                parameters=[*parameters, META_PARAMETER, PREFER_HEADER],
                body=task_body(application, task),
            )
        }

    model = model_parameter(application, task)
    return {
        f"/api/tasks/{task}/features": features("", []),
        f"/api/tasks/{task}/models/{{model}}/features": features("_by_model", [model]),
        f"/api/models/{{model}}/tasks/{task}/features": features("_of_model", [model]),
    }


def _features_answer(application: ApplicationInterface, task: str) -> JsonObject:
    """Return the response object of a task's bare result or, where the client asks for it, of one with its origin."""
    answer = task_answer(application, task)
    content = answer["content"]["application/json"]
    content["schema"] = {"anyOf": [content["schema"], _object({"result": content["schema"], "meta": META_SCHEMA})]}
    return answer | {"headers": _FEATURES_HEADERS}


def _object(properties: JsonObject, *, optional: tuple[str, ...] = ()) -> JsonObject:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


_STRING = {"type": "string"}
_STRING_OR_NULL = {"type": ["string", "null"]}
_COUNT = {"type": "integer", "minimum": 0}
_COUNT_OR_NULL = {"type": ["integer", "null"], "minimum": 0}
_NAMES = {"type": "array", "items": _STRING}
_OK = _object({"status": {"const": "ok"}})
_PLUGIN = _object(
    {
        "kind": {"enum": ["apis", "consumers", "models", "tasks"]},
        "name": _STRING,
        "version": _STRING_OR_NULL,
        "state": {"enum": ["loaded", "failed"]},
        "error": _STRING_OR_NULL,
    }
)
_PLUGIN_EXAMPLE = {"kind": "models", "name": "blip", "version": "1.0.0", "state": "loaded", "error": None}
_TASK = _object(
    {
        "task": _STRING,
        "description": _STRING,
        "version": _STRING_OR_NULL,
        "input": {"type": "object", "description": "The JSON schema of the request body"},
        "output": {"type": "object", "description": "The JSON schema of the answer"},
        "batch_fields": _NAMES | {"description": "The keys that take one value or, in batch mode, a list"},
        "models": _NAMES,
        "default_model": _STRING_OR_NULL,
    }
)
_FEATURES_HEADERS: JsonObject = {
    "Cache-Status": {
        "description": "Whether kept answers were used (RFC 9211); only with RESULT_CACHE_BYTES",
        "schema": {"type": "string", "examples": ["fes; hit"]},
    },
    "Preference-Applied": {
        "description": "That the header Prefer was followed",
        "schema": {"type": "string", "examples": [PREFERENCE]},
    },
}
_STATUS_PROPERTIES: JsonObject = {
    "model": _STRING,
    "state": {"enum": STATES},
    "state_seconds": {"type": "number", "description": "How long the model has been in its state"},
    "error": _STRING_OR_NULL,
    "progress": {
        "description": "How far the model's start has come; null unless it is starting",
        "anyOf": [
            {"type": "null"},
            _object(
                {
                    "stage": {"enum": ["downloading", "loading"]},
                    "bytes_done": _COUNT_OR_NULL | {"description": "Of the files; null unless downloading"},
                    "bytes_total": _COUNT_OR_NULL,
                }
            ),
        ],
    },
    "queue_depth": _COUNT | {"description": "Requests that wait for the model"},
    "running_jobs": _COUNT | {"description": "Requests that the model works on"},
    "consumer_type": _STRING,
    "load_seconds": {"type": ["number", "null"], "description": "How long the last load took"},
    "device": _STRING_OR_NULL | {"description": "Where the model's weights are, if that can be told"},
    "provenance": {
        "description": "Where the model's answers come from; null unless it is loaded",
        "anyOf": [{"type": "null"}, _object(PROVENANCE_PROPERTIES)],
    },
    "memory_bytes": {"type": ["integer", "null"], "description": "Main memory of the processes in which it runs"},
    "counts": _object(dict.fromkeys(("loads", "failed_loads", "jobs", "items", "failures"), _COUNT))
    | {"description": "Since the start of the engine; a failure is a job that was answered with a 5xx"},
    "pids": {"type": "array", "items": {"type": "integer"}, "description": "The processes in which the model runs"},
    "replicas": {
        "type": "array",
        "description": "These processes and those on other machines",
        "items": _object(
            {
                "node": _STRING_OR_NULL | {"description": "The other machine's address; null on this one"},
                "pid": {"type": ["integer", "null"]},
                "state": _STRING,
            }
        ),
    },
    "engine_pid": {"type": "integer", "description": "The process that has the model's queue"},
}
_STATUS = _object(_STATUS_PROPERTIES)
_STATUS_EXAMPLE = {
    "model": "blip",
    "state": "running",
    "state_seconds": 86.4,
    "error": None,
    "progress": None,
    "queue_depth": 0,
    "running_jobs": 1,
    "consumer_type": "single_thread_consumer",
    "load_seconds": 3.2,
    "device": "cuda:0",
    "provenance": {
        "checkpoint": "Salesforce/blip-image-captioning-base",
        "revision": "82a37760796d32b1411fe092ab5d4e227313294b",
        "dtype": "float16",
        "device": "cuda:0",
    },
    "memory_bytes": 2_100_000_000,
    "counts": {"loads": 1, "failed_loads": 0, "jobs": 120, "items": 340, "failures": 0},
    "pids": [4711],
    "replicas": [{"node": None, "pid": 4711, "state": "running"}],
    "engine_pid": 4711,
}
_SETTING = _object(
    {
        "name": _STRING,
        "description": _STRING,
        "value": {"type": ["string", "number", "boolean", "null"]},
        "default": {"type": ["string", "number", "boolean", "null"]},
        "allowed": _STRING | {"description": "In words, which values are allowed"},
        "secret": {"type": "boolean", "description": "Whether value and default are withheld"},
    }
)
_MODEL = _object(
    _STATUS_PROPERTIES
    | {
        "description": _STRING,
        "version": _STRING_OR_NULL,
        "tasks": _NAMES,
        "config": {
            "type": "object",
            "description": "For each task, the JSON schema of what the model takes as config; null where it is open",
            "additionalProperties": {"type": ["object", "null"]},
        },
        "settings": {"type": "array", "items": _SETTING},
    }
)
_MODEL_EXAMPLE = _STATUS_EXAMPLE | {
    "description": "BLIP: captions of images, free or continuing a given text.",
    "version": "1.0.0",
    "tasks": ["image_captioning"],
    "config": {"image_captioning": {"type": "object", "properties": {"num_beams": {"type": "integer"}}}},
    "settings": [
        {
            "name": "DEVICE",
            "description": "Where models run",
            "value": "auto",
            "default": "auto",
            "allowed": "text",
            "secret": False,
        }
    ],
}
