"""The jobs API: hand in a task's input, and fetch the result later, from any worker and after a restart."""

import math
from datetime import UTC, datetime
from typing import Any, Final

from flask import Flask, Response, jsonify, request, url_for

from feature_extraction_server.core.application import ApplicationInterface
from feature_extraction_server.core.errors import InvalidInput
from feature_extraction_server.core.job_runner import JobSettings, jobs_of
from feature_extraction_server.core.job_store import JobState, StoredJob
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.flask.meta import META_PARAMETER, META_SCHEMA, PARAMETER, wants_meta
from feature_extraction_server.flask.openapi import (
    JsonObject,
    job_body,
    json_response,
    model_parameter,
    operation,
    path_parameter,
    query_parameter,
)
from feature_extraction_server.flask.request_body import read_task_input

TAG: Final = "jobs API"

MAX_WAIT_S: Final = 60.0
DEFAULT_LIMIT: Final = 100
MAX_LIMIT: Final = 1000

job_settings: JobSettings


def add_settings(settings_manager: SettingsManager) -> None:
    """Declare the settings of stored jobs."""
    global job_settings
    job_settings = JobSettings(settings_manager)


def add_routes(application_interface: ApplicationInterface, flask_app: Flask) -> None:
    """Add the routes; the README lists them."""
    jobs = jobs_of(application_interface, job_settings)
    ttl_s = job_settings.ttl.get()

    def submit(task: str, model: str | None = None) -> tuple[Response, int, dict[str, str]]:
        application_interface.resolve(task, model)  # an unknown name is told before the body is read
        wants_meta()  # which each job has in the end; here, too, it is no key of the input
        job = jobs.submit(task, model, read_task_input(application_interface, task, reserved=(PARAMETER,)))
        return jsonify(describe_job(job, ttl_s)), 202, {"Location": url_for("jobs_api job", id=job.id)}

    def job(id: str) -> Response:
        _check_query("wait", PARAMETER)
        asks_for_meta = wants_meta() or PARAMETER not in request.args
        found = jobs.get(id, _wait_s())
        described = describe_job(found, ttl_s)
        if found.state is JobState.SUCCEEDED:
            described["result"] = found.result
            if asks_for_meta:
                described["meta"] = found.meta
        return jsonify(described)

    def cancel(id: str) -> Response | tuple[str, int]:
        cancelled = jobs.cancel(id)
        return ("", 204) if cancelled is None else jsonify(describe_job(cancelled, ttl_s))

    def latest() -> Response:
        _check_query("state", "limit")
        return jsonify([describe_job(job, ttl_s) for job in jobs.latest(_limit(), _state())])

    def add(rule: str, name: str, view: Any, method: str) -> None:
        flask_app.add_url_rule(rule, f"jobs_api {name}", view, methods=[method])

    add("/api/tasks/<task>/jobs", "submit", submit, "POST")
    add("/api/tasks/<task>/models/<model>/jobs", "submit to model", submit, "POST")
    add("/api/jobs", "latest", latest, "GET")
    add("/api/jobs/<id>", "job", job, "GET")
    add("/api/jobs/<id>", "cancel", cancel, "DELETE")


def describe_job(job: StoredJob, ttl_s: float) -> dict[str, Any]:
    """Return what a client is told of a job, its result apart; ``error`` only where there is one."""
    described: dict[str, Any] = {
        "id": job.id,
        "task": job.task,
        "model": job.model,
        "state": str(job.state),
        "queue_position": job.queue_position,
        "progress": {"done": job.n_done, "total": 1 if job.n_items is None else job.n_items},
        "created": _timestamp(job.created),
        "started": _timestamp(job.started),
        "ended": _timestamp(job.ended),
        "expires": _timestamp(None if job.ended is None else job.ended + ttl_s),
    }
    if job.error is not None:
        described["error"] = job.error
    return described


def _timestamp(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _check_query(*known: str) -> None:
    """Refuse what a misspelt filter would otherwise let through."""
    for name in request.args:
        if name not in known:
            shown = name[:40].encode("utf-8", "replace").decode()
            raise InvalidInput(f"unknown parameter {shown!r}: this route takes {', '.join(known)}", field=shown)


def _wait_s() -> float:
    text = request.args.get("wait", "0")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise InvalidInput(f"wait must be a number of seconds, 0 or more, not {text[:40]!r}", field="wait")
    return min(seconds, MAX_WAIT_S)


def _limit() -> int:
    text = request.args.get("limit", str(DEFAULT_LIMIT))
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= MAX_LIMIT and len(text) < 9):
        raise InvalidInput(f"limit must be a whole number from 1 to {MAX_LIMIT}, not {text[:40]!r}", field="limit")
    return int(text)


def _state() -> JobState | None:
    text = request.args.get("state")
    if text is None:
        return None
    if text not in list(JobState):
        raise InvalidInput(f"state must be one of {', '.join(JobState)}, not {text[:40]!r}", field="state")
    return JobState(text)


# OpenAPI


def describe_routes(application_interface: ApplicationInterface) -> dict[str, Any]:
    """Return the OpenAPI description of the routes: those that take a task's input once for each task."""
    id = path_parameter("id", "The job's id")
    get = operation(
        "A job's state and, once it has ended, its result or its error",
        tag=TAG,
        operation_id="jobs_api_job",
        answer=json_response("The job", _JOB_WITH_RESULT),
        errors=(400, 404, 500),
        parameters=[id, _WAIT, META_PARAMETER],
    )
    delete = operation(
        "Cancel a job; one that has ended is removed",
        tag=TAG,
        operation_id="jobs_api_cancel",
        answer=json_response("The job, which is cancelled", _JOB),
        errors=(404, 500),
        parameters=[id],
    )
    delete["responses"]["204"] = {"description": "The job had ended, and is removed"}
    latest = operation(
        "The jobs without their results, the newest first",
        tag=TAG,
        operation_id="jobs_api_latest",
        answer=json_response("Jobs", {"type": "array", "items": _JOB}),
        errors=(400, 500),
        parameters=[_STATE, _LIMIT],
    )
    paths: dict[str, Any] = {"/api/jobs": {"get": latest}, "/api/jobs/{id}": {"get": get, "delete": delete}}
    for task in application_interface.list_tasks():
        paths |= _describe_submit(application_interface, task)
    return paths


def _describe_submit(application: ApplicationInterface, task: str) -> dict[str, Any]:
    location = {"description": "Where the job is", "schema": {"type": "string"}}

    def submit(by: str, parameters: list[JsonObject]) -> JsonObject:
        return {
            "post": operation(
                "Hand in a job; answers at once",
                tag=task,
                operation_id=f"jobs_api_{task}{by}",
                status=202,
                answer=json_response("The job is accepted", _JOB) | {"headers": {"Location": location}},
                errors=(400, 404, 413, 415, 429, 500),
                parameters=parameters,
                body=job_body(application, task),
            )
        }

    return {
        f"/api/tasks/{task}/jobs": submit("", []),
        f"/api/tasks/{task}/models/{{model}}/jobs": submit("_by_model", [model_parameter(application, task)]),
    }


_TIME: JsonObject = {"type": ["string", "null"], "format": "date-time"}
_COUNT: JsonObject = {"type": "integer", "minimum": 0}
_PROPERTIES: JsonObject = {
    "id": {"type": "string"},
    "task": {"type": "string"},
    "model": {"type": "string"},
    "state": {"enum": list(JobState)},
    "queue_position": {
        "type": ["integer", "null"],
        "minimum": 1,
        "description": "The job's place among the queued ones of its model",
    },
    "progress": {
        "type": "object",
        "description": "How many of the items are done",
        "properties": {"done": _COUNT, "total": _COUNT},
        "required": ["done", "total"],
    },
    "created": {"type": "string", "format": "date-time"},
    "started": _TIME,
    "ended": _TIME,
    "expires": _TIME,
}
_ERROR: JsonObject = {"$ref": "#/components/schemas/Error"}
_JOB: JsonObject = {
    "type": "object",
    "properties": _PROPERTIES | {"error": _ERROR},
    "required": list(_PROPERTIES),
}
_META: JsonObject = {
    "description": "Where the result comes from; null for a job of an earlier release",
    "anyOf": [META_SCHEMA, {"type": "null"}],
}
_RESULT: JsonObject = {"description": "The task's result, if it succeeded"}
_JOB_WITH_RESULT = _JOB | {"properties": _PROPERTIES | {"error": _ERROR, "result": _RESULT, "meta": _META}}
_WAIT = query_parameter(
    "wait",
    f"Seconds to wait for the job's end, {MAX_WAIT_S:g} at most",
    {"type": "number", "minimum": 0, "default": 0},
)
_STATE = query_parameter("state", "Only jobs in this state", {"enum": list(JobState)})
_LIMIT = query_parameter(
    "limit", "How many jobs", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT}
)
