"""What the api plugins' descriptions in OpenAPI 3.1 share: operations, errors, and the tasks' inputs and answers.

An api plugin describes its routes by a function ``describe_routes(application_interface)``, which returns its part of
the document's ``paths``: path items by path. It builds them from the functions here. They refer to ``components()``,
which hold the errors and, for each task, the schemas ``<task>.input`` and ``<task>.output``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from feature_extraction_server.core.application import ApplicationInterface
from feature_extraction_server.core.describe import input_schema, output_schema
from feature_extraction_server.core.task import MediaField, TaskSpec

JsonObject = dict[str, Any]

#: What may go wrong where a task is run on a body that a client sent.
RUN_ERRORS: Final = (400, 404, 413, 415, 429, 500, 503, 504)

_SCHEMAS: Final = "#/components/schemas/"
_RETRY_AFTER: Final = {"Retry-After": {"description": "Seconds to wait", "schema": {"type": "integer", "minimum": 1}}}
# Status: what it means, an example, and the headers that come with it.
_ERRORS: Final[dict[int, tuple[str, JsonObject, JsonObject]]] = {
    400: (
        "The request is at fault: invalid JSON, a missing or unknown key, a value that does not fit or damaged media "
        "(`invalid_input`); or a task or model is not named and there is no default (`no_default`)",
        {"error": "image[1] is not an image of a known format", "code": "invalid_input", "field": "image[1]"},
        {},
    ),
    401: (
        "The request has none of the server's API keys (`unauthorized`)",
        {"error": "send one of the server's API keys, as Authorization: Bearer <key>", "code": "unauthorized"},
        {},
    ),
    403: (
        "A page of another origin sent the request, which CORS_ORIGINS does not name (`foreign_origin`)",
        {"error": "pages of https://example.org may not use this server (CORS_ORIGINS)", "code": "foreign_origin"},
        {},
    ),
    404: (
        "There is no such route, task or model (`not_found`, `task_not_found`, `model_not_found`), or the model does "
        "not implement the task (`task_not_supported`)",
        {"error": "there is no model 'blop'; there are blip, blip2, vit_gpt2", "code": "model_not_found"},
        {},
    ),
    405: (
        "The route takes another method (`method_not_allowed`)",
        {"error": "GET is not allowed here; use POST, OPTIONS", "code": "method_not_allowed"},
        {"Allow": {"description": "The methods that the route takes", "schema": {"type": "string"}}},
    ),
    413: (
        "Too many bytes, pixels, seconds or items (`too_large`)",
        {"error": "image has 200 x 200 = 40000 pixels; at most 10000 are allowed", "code": "too_large"},
        {},
    ),
    415: (
        "The body is of a type that the route does not take, or is compressed otherwise than by gzip or deflate "
        "(`unsupported_media_type`)",
        {"error": "the body must be JSON", "code": "unsupported_media_type"},
        {},
    ),
    429: (
        "Too many requests wait for the model, or too many jobs are queued (`queue_full`); or more requests were sent "
        "than RATE_LIMIT allows (`rate_limited`)",
        {"error": "the queue of the model blip is full", "code": "queue_full"},
        _RETRY_AFTER,
    ),
    500: (
        "The model's function failed (`model_error`), or the server did (`internal_error`); the log says why",
        {"error": "the model blip failed: RuntimeError: out of memory", "code": "model_error"},
        {},
    ),
    503: (
        "The model could not be loaded (`model_load_failed`); or it was stopped, its consumer died or the engine "
        "process ended (`model_unavailable`)",
        {"error": "the model blip failed to load: no such checkpoint", "code": "model_load_failed"},
        _RETRY_AFTER,
    ),
    504: (
        "No answer within REQUEST_TIMEOUT, or a URL's file not within URL_TIMEOUT (`deadline_exceeded`)",
        {"error": "the model blip gave no answer in time (REQUEST_TIMEOUT)", "code": "deadline_exceeded"},
        {},
    ),
}


# Parts of a path item


def operation(
    summary: str,
    *,
    tag: str,
    operation_id: str,
    answer: JsonObject,
    status: int = 200,
    errors: Sequence[int] = (500,),
    parameters: Sequence[JsonObject] = (),
    body: JsonObject | None = None,
    description: str = "",
) -> JsonObject:
    """Return an operation object.

    Args:
        tag: under which heading it is shown; one for each api plugin, and the task's name where it runs one.
        operation_id: unique in the whole document: letters, digits and underscores, the api's name first.
        answer: the response object of success, as ``json_response`` makes it.
        errors: the statuses of the errors that it may answer with, of those in ``components()``.
        body: the request body object, as ``json_body`` or ``task_body`` makes it.
    """
    described: JsonObject = {"tags": [tag], "operationId": operation_id, "summary": summary}
    if description:
        described["description"] = description
    if parameters:
        described["parameters"] = list(parameters)
    if body is not None:
        described["requestBody"] = body
    described["responses"] = {str(status): answer} | error_responses(errors)
    return described


def error_responses(statuses: Iterable[int]) -> JsonObject:
    """Return the responses object of some errors."""
    return {str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses}


def json_response(description: str, schema: JsonObject, example: Any = None) -> JsonObject:
    """Return the response object of a JSON answer."""
    return {"description": description, "content": {"application/json": _media_type(schema, example)}}


def json_body(schema: JsonObject, example: Any = None, *, required: bool = True) -> JsonObject:
    """Return the request body object of a body that must be JSON."""
    return {"required": required, "content": {"application/json": _media_type(schema, example)}}


def path_parameter(name: str, description: str, values: Sequence[str] = ()) -> JsonObject:
    """Return a parameter object for a part of the path, which is one of ``values`` where there are any."""
    schema: JsonObject = {"type": "string"} | ({"enum": list(values)} if values else {})
    return {"name": name, "in": "path", "required": True, "description": description, "schema": schema}


def query_parameter(name: str, description: str, schema: JsonObject) -> JsonObject:
    """Return a parameter object for the query string, which may be left out."""
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


def model_parameter(application: ApplicationInterface, task: str | None = None) -> JsonObject:
    """Return the parameter object of the path's part ``{model}``: any model or, with ``task``, one that does it."""
    models = application.list_models() if task is None else application.models_for(task)
    return path_parameter("model", "The model's name", models)


def task_parameter(application: ApplicationInterface) -> JsonObject:
    """Return the parameter object of the path's part ``{task}``."""
    return path_parameter("task", "The task's name", application.list_tasks())


# Tasks


def task_body(application: ApplicationInterface, task: str) -> JsonObject:
    """Return the request body object of a route that runs a task on what ``read_task_input`` reads.

    It is JSON and, where the task declares its fields, a form or one file.
    """
    body = json_body({"$ref": f"{_SCHEMAS}{task}.input"}, task_example(application, task))
    spec = application.registry.spec(task)
    if spec is not None:
        body["content"]["multipart/form-data"] = {"schema": _form_schema(spec)}
        required = [field for field in spec.inputs.values() if field.required]
        if len(required) == 1 and isinstance(required[0], MediaField):
            body["content"][f"{required[0].medium}/*"] = {"schema": _file_schema(required[0])}
    return body


def job_body(application: ApplicationInterface, task: str) -> JsonObject:
    """Return the request body object of a route that takes a job: as ``task_body``, but for tasks written by hand.

    Of their input, only the keys are looked at before the job is run.
    """
    if application.registry.spec(task) is not None:
        return task_body(application, task)
    schema = input_schema(application.registry, task)
    keys: JsonObject = {key: {} for key in schema["properties"]}
    return json_body(schema | {"properties": keys}, task_example(application, task))


def task_answer(application: ApplicationInterface, task: str) -> JsonObject:
    """Return the response object of a task's bare result."""
    example = example_of(output_schema(application.registry, task))
    return json_response("The task's result", {"$ref": f"{_SCHEMAS}{task}.output"}, example)


def task_example(application: ApplicationInterface, task: str) -> JsonObject:
    """Return an example of a task's input, with the keys that are required."""
    schema = input_schema(application.registry, task)
    return {key: example_of(value) for key, value in schema["properties"].items() if key in schema["required"]}


def example_of(schema: JsonObject) -> Any:
    """Return a schema's example: its own, that of the first of several choices, or one made up from its type.

    It is None where the schema does not say enough.
    """
    if "anyOf" in schema:
        schema = schema["anyOf"][0]
    if schema.get("examples"):
        return schema["examples"][0]
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    kind = schema.get("type")
    if kind == "object":
        found = {key: example_of(value) for key, value in schema.get("properties", {}).items()}
        return {key: value for key, value in found.items() if value is not None or key in schema.get("required", ())}
    if kind == "array":
        return [example_of(schema["items"])] if "items" in schema else []
    plain = {"string": "text", "integer": schema.get("minimum", 1), "number": 0.5, "boolean": True}
    return plain.get(kind[0] if isinstance(kind, list) else str(kind))


# Components


def components(application: ApplicationInterface) -> JsonObject:
    """Return the components object that every api plugin's description may refer to."""
    schemas: JsonObject = {"Error": _error_schema()}
    for task in application.list_tasks():
        for name, schema in (
            ("input", input_schema(application.registry, task)),
            ("output", output_schema(application.registry, task)),
        ):
            definitions = schema.pop("$defs", {})
            schemas[f"{task}.{name}"] = _referring_to_components(schema, task)
            schemas |= {f"{task}.{key}": _referring_to_components(value, task) for key, value in definitions.items()}
    responses = {
        str(status): json_response(description, {"$ref": f"{_SCHEMAS}Error"}, example)
        | ({"headers": headers} if headers else {})
        for status, (description, example, headers) in _ERRORS.items()
    }
    return {"schemas": schemas, "responses": responses}


def _error_schema() -> JsonObject:
    return {
        "type": "object",
        "description": "What every error is answered with",
        "properties": {
            "error": {"type": "string", "description": "One sentence that says what was wrong"},
            "code": {"type": "string", "description": "A stable name of the kind of error"},
            "field": {"type": "string", "description": "Which key of the input is at fault, as image[1]"},
        },
        "required": ["error", "code"],
    }


def _form_schema(spec: TaskSpec) -> JsonObject:
    """Return the schema of a task's input as a form, in which a file is bytes, and repeated where there are several."""
    properties: JsonObject = {}
    for key, field in spec.inputs.items():
        schema = field.schema
        if isinstance(field, MediaField):
            schema = {"type": "array", "items": _file_schema(field), "minItems": 1}
        elif field.batch:
            schema = {"anyOf": [schema, {"type": "array", "items": schema, "minItems": 1}]}
        properties[key] = schema | {"description": field.description}
    required = [key for key, field in spec.inputs.items() if field.required]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _file_schema(field: MediaField) -> JsonObject:
    return {"type": "string", "format": "binary", "contentMediaType": f"{field.medium}/*"}


def _media_type(schema: JsonObject, example: Any) -> JsonObject:
    example = example_of(schema) if example is None else example
    return {"schema": schema} | ({} if example is None else {"example": example})


def _referring_to_components(schema: Any, task: str) -> Any:
    """Turn references to a schema's own definitions into references to the document's components."""
    if isinstance(schema, list):
        return [_referring_to_components(element, task) for element in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: f"{_SCHEMAS}{task}.{value.removeprefix('#/$defs/')}"
        if key == "$ref"
        else _referring_to_components(value, task)
        for key, value in schema.items()
    }
