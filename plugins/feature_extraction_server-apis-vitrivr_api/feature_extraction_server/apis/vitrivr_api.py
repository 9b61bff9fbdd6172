"""The vitrivr API: the two interfaces by which vitrivr-engine asks for features.

Its module *fes* hands in jobs and polls for their results (``/api/tasks/<task>/<model>/jobs``). Its external features
post a form with a data URL (``/extract/<feature>``) and wait for the answer.
"""

import base64
import binascii
import logging
from collections.abc import Callable
from typing import Any, Final, NamedTuple
from urllib.parse import unquote_to_bytes

from flask import Flask, Response, jsonify

from feature_extraction_server.core.application import ApplicationInterface
from feature_extraction_server.core.errors import (
    InvalidInput,
    ModelUnavailable,
    NotFound,
    QueueFull,
    ServerError,
    SettingError,
)
from feature_extraction_server.core.job_runner import JobSettings, jobs_of
from feature_extraction_server.core.job_store import JobState
from feature_extraction_server.core.settings import Setting, SettingsManager
from feature_extraction_server.core.task import AudioField, ImageField, TextField
from feature_extraction_server.flask.app import client_waits
from feature_extraction_server.flask.openapi import (
    RUN_ERRORS,
    JsonObject,
    job_body,
    json_body,
    json_response,
    model_parameter,
    operation,
    path_parameter,
    task_example,
)
from feature_extraction_server.flask.request_body import read_body, read_json_object

logger = logging.getLogger(__name__)

TAG: Final = "vitrivr API"
DEFAULT_FEATURES: Final = (
    "clip_image=image_embedding:open_clip_vit_b32,clip_text=text_query_embedding:open_clip_vit_b32,"
    "dino=image_embedding:dino_v2_vits14,asr=automated_speech_recognition,"
    "ocr=optical_character_recognition:rapidocr"
)
_STATUS: Final = {
    JobState.QUEUED: "starting",
    JobState.RUNNING: "running",
    JobState.SUCCEEDED: "complete",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "failed",
}
# What a form escapes of a data URL. In megabytes of base64, replacing them is ten times as fast as unquoting.
_ESCAPED: Final = {b"%2B": b"+", b"%2F": b"/", b"%3D": b"=", b"%3A": b":", b"%3B": b";", b"%2C": b","}

job_settings: JobSettings
features: Setting[str]
poll_hold: Setting[float]


class Feature(NamedTuple):
    """What a feature's name stands for; the model is the task's default one where it is None."""

    task: str
    model: str | None


def add_settings(settings_manager: SettingsManager) -> None:
    """Declare the settings of stored jobs, and this API's own."""
    global job_settings, features, poll_hold
    job_settings = JobSettings(settings_manager)
    features = settings_manager.add_setting(
        name="VITRIVR_FEATURES",
        type=str,
        default=DEFAULT_FEATURES,
        description="What vitrivr-engine's external features mean here: feature=task or feature=task:model, "
        "separated by commas",
    )
    poll_hold = settings_manager.add_setting(
        name="VITRIVR_POLL_HOLD",
        type=float,
        default=0.9,
        minimum=0,
        maximum=15,
        description="Seconds that vitrivr-engine's question for a job's result is held until the result is there",
    )
    settings_manager.add_check(read_features)


def read_features() -> dict[str, Feature]:
    """Return the features that VITRIVR_FEATURES names.

    Raises:
        SettingError: it is malformed.
    """
    found = {}
    for entry in filter(None, map(str.strip, features.get().split(","))):
        name, _, meaning = (part.strip() for part in entry.partition("="))
        task, colon, model = (part.strip() for part in meaning.partition(":"))
        if not name or not task or bool(colon) != bool(model):
            raise SettingError(
                f"VITRIVR_FEATURES={features.get()!r} is not allowed: {entry!r} is not of the form feature=task or "
                "feature=task:model"
            )
        found[name] = Feature(task, model or None)
    return found


def add_routes(application_interface: ApplicationInterface, flask_app: Flask) -> None:
    """Add the routes; the README lists them."""

    def add(rule: str, view: Callable[..., Any], method: str) -> None:
        flask_app.add_url_rule(rule, f"vitrivr_api {method} {rule}", view, methods=[method])

    _add_lists(application_interface, add)
    _add_jobs(application_interface, add)
    _add_features(application_interface, add)


Add = Callable[[str, Callable[..., Any], str], None]


def _add_lists(application: ApplicationInterface, add: Add) -> None:
    def models_for(task: str) -> Response:
        return jsonify(application.models_for(_snake(task, application.list_tasks())))

    def tasks_of(model: str) -> Response:
        return jsonify(application.tasks_of(_snake(model, application.list_models())))

    add("/api/tasks", lambda: jsonify(application.list_tasks()), "GET")
    add("/api/models", lambda: jsonify(application.list_models()), "GET")
    add("/api/tasks/<task>/models", models_for, "GET")
    add("/api/models/<model>/tasks", tasks_of, "GET")


# Jobs


def _add_jobs(application: ApplicationInterface, add: Add) -> None:
    jobs, hold_s = jobs_of(application, job_settings), poll_hold.get()

    def submit(task: str, model: str, *, batched: bool) -> dict[str, str]:
        task, model = application.resolve(
            _snake(task, application.list_tasks()), _snake(model, application.list_models())
        )
        payload = read_json_object()
        spec = application.registry.spec(task)
        for key in spec.batch_fields if spec is not None else ():
            if key in payload and isinstance(payload[key], list) != batched:
                wanted = "a list of values" if batched else "one value"
                raise InvalidInput(f"{key} must be {wanted} on this route", field=key)
        job = jobs.submit(task, model, payload)
        return {"id": job.id, "status": _STATUS[job.state]}

    def result(task: str, id: str, *, batched: bool) -> dict[str, Any]:
        task = _snake(task, application.list_tasks())
        application.require_task(task)
        job = jobs.get(id, hold_s)
        has_many = batched if application.registry.spec(task) is None else job.n_items is not None
        # The jobs API takes lists where this one takes one value, and its jobs are asked for here as well.
        if job.task != task or (batched and not has_many):
            raise NotFound(f"the job {id[:80]!r} was not handed in here")
        answer: dict[str, Any] = {"status": _STATUS[job.state], "result": None}
        if job.state is JobState.SUCCEEDED:
            answer["result"] = [as_object(task, one) for one in job.result] if has_many else as_object(task, job.result)
        elif job.error is not None:  # this client takes no reason
            logger.warning("The job %s (%s, %s) failed: %s", job.id, job.task, job.model, job.error["error"])
        return answer

    add("/api/tasks/<task>/<model>/jobs", lambda task, model: submit(task, model, batched=False), "POST")
    add("/api/tasks/<task>/batched/<model>/jobs", lambda task, model: submit(task, model, batched=True), "POST")
    add("/api/tasks/<task>/jobs/<id>", lambda task, id: result(task, id, batched=False), "GET")
    add("/api/tasks/<task>/batched/jobs/<id>", lambda task, id: result(task, id, batched=True), "GET")


def as_object(task: str, result: Any) -> dict[str, Any]:
    """Return one item's result as the object that vitrivr-engine reads."""
    if task.endswith("captioning"):
        return {"caption": result[0] if result else ""}
    if task.endswith("speech_recognition"):
        return {"transcript": _text(result)}
    if task.endswith("character_recognition"):
        return {"text": _text(result)}
    if task.endswith("embedding") and not isinstance(result, dict):
        return {"embedding": result}
    if isinstance(result, dict):
        # It reads the corners of boxes as whole numbers.
        boxes = {"boxes": [[round(corner) for corner in box] for box in result["boxes"]]} if "boxes" in result else {}
        return result | boxes
    return {"probabilities" if task.endswith("classification") else "result": result}


def _text(result: Any) -> str:
    """Return the text alone of a result that may tell more about it."""
    if isinstance(result, dict):
        return str(result.get("text", ""))
    if isinstance(result, list):
        return "\n".join(map(_text, result))
    return str(result)


def _snake(name: str, known: list[str]) -> str:
    """Return a plugin's name that may be spelt with hyphens."""
    return name if name in known else name.replace("-", "_")


# External features


def _add_features(application: ApplicationInterface, add: Add) -> None:
    known = read_features()

    def extract(feature: str) -> Response:
        if feature not in known:
            raise NotFound(
                f"there is no feature {feature[:80]!r}; there are {', '.join(sorted(known))} (VITRIVR_FEATURES)"
            )
        task, model = application.resolve(*known[feature])
        spec = application.registry.spec(task)
        if spec is None:
            raise ServerError(f"the task {task} declares no fields, so that it cannot be a feature (VITRIVR_FEATURES)")
        key = spec.batch_fields[0]
        url = _read_data_url()
        payload = {key: _decode_text(url) if isinstance(spec.inputs[key], TextField) else url}
        try:
            return jsonify(as_answer(application.run(task, model, payload, is_wanted=client_waits())))
        except QueueFull as error:  # this client takes a 429 as final
            raise ModelUnavailable(error.message, retry_after=error.retry_after) from None

    add("/extract/<feature>", extract, "POST")


def as_answer(result: Any) -> Any:
    """Return a result as the body that vitrivr-engine's external features read: a list of numbers, or a text."""
    if isinstance(result, str):
        return {"text": result}
    if isinstance(result, list) and result and isinstance(result[0], str):
        return {"text": result[0]}
    return result


def _read_data_url() -> str:
    """Return the field ``data`` of the form that is the current request's body; or the body, if it is a data URL."""
    body = read_body()
    # Found by its place: a list of all fields may take many times as much memory as the body.
    start = 0 if body.startswith(b"data=") else body.find(b"&data=") + 1
    if body.startswith(b"data=", start):
        end = body.find(b"&", start)
        value = body[start + len(b"data=") : len(body) if end < 0 else end]
    elif body.startswith(b"data:"):
        value = body
    else:
        raise InvalidInput("the body must be a form with the field data, which holds a data URL", field="data")
    # A plus is itself, and no space: base64 has no spaces, and some releases of the client do not escape it.
    for escaped, byte in _ESCAPED.items():
        value = value.replace(escaped, byte)
    value = unquote_to_bytes(value) if b"%" in value else value
    if not value.isascii():
        raise InvalidInput("data must be a data URL, as data:image/png;base64,...", field="data")
    return value.decode("ascii")


def _decode_text(url: str) -> str:
    """Decode a data URL of a text, or its base64 alone, which is base64 even where the URL does not say so."""
    try:
        return base64.b64decode(url.rpartition(",")[2], validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        raise InvalidInput("data must hold the base64 of a text in UTF-8", field="data") from None


# OpenAPI


def describe_routes(application_interface: ApplicationInterface) -> dict[str, Any]:
    """Return the OpenAPI description of the routes: those that run a task once for each task."""
    paths = _describe_lists(application_interface) | _describe_features(application_interface)
    for task in application_interface.list_tasks():
        for batched in (False, True):
            paths |= _describe_jobs(application_interface, task, batched=batched)
    return paths


def _describe_lists(application: ApplicationInterface) -> dict[str, Any]:
    def names(summary: str, name: str, *parameters: JsonObject) -> JsonObject:
        answer = json_response("Names, sorted", {"type": "array", "items": {"type": "string"}})
        errors = (404, 500) if parameters else (500,)
        operation_id = f"vitrivr_api_{name}"
        return {
            "get": operation(
                summary, tag=TAG, operation_id=operation_id, answer=answer, errors=errors, parameters=parameters
            )
        }

    task = path_parameter("task", "The task's name, with hyphens or underscores", application.list_tasks())
    return {
        "/api/tasks": names("All tasks", "tasks"),
        "/api/models": names("All models", "models"),
        "/api/tasks/{task}/models": names("The models that implement a task", "models_for", task),
        "/api/models/{model}/tasks": names("The tasks of a model", "tasks_of", model_parameter(application)),
    }


def _describe_jobs(application: ApplicationInterface, task: str, *, batched: bool) -> dict[str, Any]:
    path = f"/api/tasks/{task}" + ("/batched" if batched else "")
    name, kind = f"vitrivr_api_{task}" + ("_batched" if batched else ""), "batched job" if batched else "job"
    status: JsonObject = {"enum": sorted(set(_STATUS.values()))}
    accepted = {"type": "object", "properties": {"id": {"type": "string"}, "status": status}}
    one: JsonObject = {
        "type": "object",
        "description": "The result of one item, by the names that vitrivr-engine reads",
    }
    many: JsonObject = {"type": "array", "items": one}
    result: JsonObject = {"anyOf": [*([] if batched else [one]), many, {"type": "null"}]}
    answer = {"type": "object", "properties": {"status": status, "result": result}, "required": ["status", "result"]}
    post = operation(
        f"Hand in a {kind}",
        tag=task,
        operation_id=f"{name}_submit",
        answer=json_response("The job is accepted", accepted | {"required": ["id", "status"]}),
        errors=(400, 404, 413, 415, 429, 500),
        parameters=[model_parameter(application, task)],
        body=_body(application, task, batched=batched),
    )
    get = operation(
        f"The result of a {kind}, as soon as it is there or VITRIVR_POLL_HOLD has passed",
        tag=task,
        operation_id=f"{name}_result",
        answer=json_response("How far the job is", answer),
        errors=(404, 500),
        parameters=[path_parameter("id", "The job's id")],
    )
    return {f"{path}/{{model}}/jobs": {"post": post}, f"{path}/jobs/{{id}}": {"get": get}}


def _body(application: ApplicationInterface, task: str, *, batched: bool) -> JsonObject:
    """Return what a job's body may be: a list for each batch field, or one value for each."""
    spec = application.registry.spec(task)
    if spec is None:
        return job_body(application, task)
    schema, example = spec.input_schema(), task_example(application, task)
    for key in spec.batch_fields:
        one, many = schema["properties"][key].pop("anyOf")
        schema["properties"][key] |= {"allOf": [many if batched else one]}
        if batched and key in example:
            example[key] = [example[key]]
    return json_body(schema, example)


def _describe_features(application: ApplicationInterface) -> dict[str, Any]:
    return {
        f"/extract/{name}": {"post": _describe_feature(application, name, feature)}
        for name, feature in sorted(read_features().items())
    }


def _describe_feature(application: ApplicationInterface, name: str, feature: Feature) -> JsonObject:
    spec = application.registry.spec(feature.task) if feature.task in application.list_tasks() else None
    field = None if spec is None else spec.inputs[spec.batch_fields[0]]
    kinds = {ImageField: "image/*", AudioField: "audio/*", TextField: "text/plain"}
    media_type = None if field is None else kinds.get(type(field))
    data = {"type": "string", "minLength": 1, "description": "A data URL, as data:image/png;base64,..."}
    form = {
        "type": "object",
        "properties": {"data": data | ({"contentMediaType": media_type} if media_type else {})},
        "required": ["data"],
    }
    answer = {"anyOf": [{"type": "array"}, {"type": "object"}]}
    return operation(
        f"Extract the feature {name}, by the task {feature.task}",
        tag=TAG,
        operation_id=f"vitrivr_api_extract_{name}",
        answer=json_response("The vector, or an object that holds the text", answer),
        errors=[status for status in RUN_ERRORS if status != 429],
        body={"required": True, "content": {"application/x-www-form-urlencoded": {"schema": form}}},
    )
