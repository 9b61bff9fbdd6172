"""The OpenAI-compatible API: models, embeddings, transcriptions and translations below ``/v1``.

Requests, answers and errors have that API's names and shapes; the tasks ``text_embedding`` and
``automated_speech_recognition`` do the work.
"""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypeVar

from flask import Flask, Response, jsonify, request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, field_validator

from feature_extraction_server.core.application import ApplicationInterface
from feature_extraction_server.core.describe import default_model
from feature_extraction_server.core.errors import (
    InvalidInput,
    ModelNotFound,
    ServerError,
    TaskNotSupported,
    UnsupportedMediaType,
)
from feature_extraction_server.flask.app import client_waits
from feature_extraction_server.flask.openapi import (
    RUN_ERRORS,
    JsonObject,
    json_body,
    json_response,
    operation,
    path_parameter,
)
from feature_extraction_server.flask.request_body import read_form, read_json_object

TAG = "OpenAI-compatible API"
EMBEDDING = "text_embedding"
SPEECH = "automated_speech_recognition"

#: What stands between two times in the subtitles of SRT, where no escape is known.
_ARROW = re.compile("-{2,}>")
FORMATS_WITH_TIMES = ("verbose_json", "srt", "vtt")
#: What an error of a task or a model is about, by the beginnings of its field's name, and what a request calls it.
NAMES = {
    "text": "input",
    "audio": "file",
    "config.task": "model",
    "config.timestamps": "timestamp_granularities",
    "config.": "",
}
#: The parameters that only some models take, by what these call them in ``config``.
OPTIONAL = {
    "dimensions": "dimensions",
    "language": "language",
    "prompt": "prompt",
    "temperature": "temperature",
    "timestamp_granularities": "timestamps",
}

Texts = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}


class Parameters(BaseModel):
    """What a request may say; whatever it says besides is an error that names it."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None


class EmbeddingParameters(Parameters):
    """Of ``/v1/embeddings``."""

    model_config = ConfigDict(strict=True)

    input: Annotated[list[str], Field(min_length=1), WithJsonSchema(Texts)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        if isinstance(value, list) and any(isinstance(element, (int, list)) for element in value):
            raise ValueError("send texts; token ids are not taken, since each model has a tokenizer of its own")
        return [value] if isinstance(value, str) else value


class TranslationParameters(Parameters):
    """Of ``/v1/audio/translations``, besides the file."""

    prompt: str | None = None
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = "json"
    temperature: float = Field(0, ge=0, le=1)


class TranscriptionParameters(TranslationParameters):
    """Of ``/v1/audio/transcriptions``, besides the file."""

    language: str | None = None
    timestamp_granularities: list[Literal["segment", "word"]] | None = None
    stream: Literal["false"] = "false"

    @field_validator("stream", mode="before")
    @classmethod
    def _is_off(cls, stream: Any) -> Any:
        if stream != "false":
            raise ValueError("an answer comes as a whole, so that stream can only be false")
        return stream


AnyParameters = TypeVar("AnyParameters", bound=Parameters)


def add_routes(application_interface: ApplicationInterface, flask_app: Flask) -> None:
    """Add the routes, and see that errors below ``/v1`` have this API's shape; the README lists them."""

    def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_object(name) for name in _models(application_interface)]}

    def model(model: str) -> dict[str, Any]:
        names = _models(application_interface)
        if model not in names:
            known = ", ".join(names) or "none"
            raise ModelNotFound(f"there is no model {model[:80]!r} for this API; there are {known}", field="model")
        return _model_object(model)

    def embeddings() -> Response:
        return jsonify(_embeddings(application_interface))

    def transcriptions() -> Response:
        recording, parameters = _read_form(application_interface, TranscriptionParameters)
        return _transcript(application_interface, recording, parameters, "transcribe")

    def translations() -> Response:
        recording, parameters = _read_form(application_interface, TranslationParameters)
        return _transcript(application_interface, recording, parameters, "translate")

    def add(rule: str, view: Any, method: str) -> None:
        flask_app.add_url_rule(rule, f"openai_api {method} {rule}", view, methods=[method])

    add("/v1/models", models, "GET")
    add("/v1/models/<model>", model, "GET")
    add("/v1/embeddings", embeddings, "POST")
    add("/v1/audio/transcriptions", transcriptions, "POST")
    add("/v1/audio/translations", translations, "POST")
    flask_app.after_request(_shape_errors)


# Models


def _models(application: ApplicationInterface) -> list[str]:
    """Return the models that a route here can run."""
    tasks = [task for task in (EMBEDDING, SPEECH) if task in application.list_tasks()]
    return sorted({model for task in tasks for model in application.models_for(task)})


def _model_object(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "feature-extraction-server"}


def _takes(application: ApplicationInterface, task: str, model: str, key: str) -> bool:
    """Tell whether a model declares a key of ``config``. One that declares none may well ignore what it is sent."""
    declared = application.registry.config_type(model, task)
    return declared is not None and key in declared.model_fields


# Embeddings


def _embeddings(application: ApplicationInterface) -> dict[str, Any]:
    parameters = _checked(EmbeddingParameters, read_json_object())
    _, model = application.resolve(EMBEDDING, parameters.model)
    config: dict[str, Any] = {}
    if _takes(application, EMBEDDING, model, "count_tokens"):
        config["count_tokens"] = True
    if parameters.dimensions is not None and _takes(application, EMBEDDING, model, "dimensions"):
        config["dimensions"] = parameters.dimensions
    with _in_the_request_s_terms():
        results = application.run(
            EMBEDDING, model, {"text": parameters.input, "config": config}, is_wanted=client_waits()
        )
    vectors = [result["embedding"] if isinstance(result, dict) else result for result in results]
    n_tokens = sum(result["tokens"] for result in results if isinstance(result, dict))
    if parameters.dimensions not in (None, length := len(vectors[0])):
        raise InvalidInput(
            f"dimensions: the vectors of the model {model} have {length} dimensions, and it gives no others",
            field="dimensions",
        )
    encode = _base64 if parameters.encoding_format == "base64" else list
    data = [
        {"object": "embedding", "index": index, "embedding": encode(vector)} for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


# Speech


def _read_form(application: ApplicationInterface, parameters: type[AnyParameters]) -> tuple[bytes | str, AnyParameters]:
    """Return the recording, a file or its base64, and the other parameters. An empty one counts as absent."""
    if request.mimetype != "multipart/form-data":
        raise UnsupportedMediaType(
            "the body must be a form (multipart/form-data) that has the recording as its file "
            f"(it was sent with: {request.mimetype[:80] or 'none'})"
        )
    parts = read_form(application).parts
    files = parts.pop("file", [])
    if len(files) != 1:
        raise InvalidInput(f"file: the form must have one recording, not {len(files)}", field="file")
    texts = {key: [text for part in found if (text := part.text(key))] for key, found in parts.items()}
    for key, found in texts.items():
        if len(found) > 1 and key != "timestamp_granularities":
            raise InvalidInput(f"{key} is given {len(found)} times", field=key)
    body = {key: found if key == "timestamp_granularities" else found[0] for key, found in texts.items() if found}
    return files[0].value("file", is_file=True), _checked(parameters, body)


def _transcript(
    application: ApplicationInterface, recording: bytes | str, parameters: TranslationParameters, task: str
) -> Response:
    _, model = application.resolve(SPEECH, parameters.model)
    config = _speech_config(application, model, parameters, task)
    with _in_the_request_s_terms():
        result = application.run(SPEECH, model, {"audio": recording, "config": config}, is_wanted=client_waits())
    if parameters.response_format == "json":
        return jsonify({"text": result})
    if parameters.response_format == "verbose_json":
        return jsonify(_verbose(result, parameters, task))
    text = {"text": lambda told: f"{told}\n", "srt": _srt, "vtt": _vtt}[parameters.response_format](result)
    return Response(text, mimetype="text/vtt" if parameters.response_format == "vtt" else "text/plain")


def _speech_config(
    application: ApplicationInterface, model: str, parameters: TranslationParameters, task: str
) -> dict[str, Any]:
    """Return the model's ``config`` for a request.

    Raises:
        InvalidInput: the model does not take something that the request says.
        TaskNotSupported: it cannot translate.
    """
    config: dict[str, Any] = parameters.model_dump(include={"language", "prompt"}, exclude_none=True)
    if parameters.temperature:
        config["temperature"] = parameters.temperature
    for key in config:
        if not _takes(application, SPEECH, model, key):
            raise InvalidInput(f"{key}: the model {model} takes none", field=key)
    granularities = getattr(parameters, "timestamp_granularities", None)
    if granularities and parameters.response_format != "verbose_json":
        raise InvalidInput(
            "timestamp_granularities: only the response_format verbose_json has them", field="timestamp_granularities"
        )
    if parameters.response_format in FORMATS_WITH_TIMES:
        if not _takes(application, SPEECH, model, "timestamps"):
            raise InvalidInput(f"response_format: the model {model} tells no times", field="response_format")
        config["timestamps"] = "words" if "word" in (granularities or ()) else "segments"
    if task == "translate":
        if not _takes(application, SPEECH, model, "task"):
            raise TaskNotSupported(f"the model {model} cannot translate", field="model")
        config["task"] = task
    return config


def _verbose(transcript: dict[str, Any], parameters: TranslationParameters, task: str) -> dict[str, Any]:
    granularities = getattr(parameters, "timestamp_granularities", None) or ["segment"]
    answer = {
        "task": task,
        "language": "en" if task == "translate" else transcript["language"] or "",
        "duration": transcript["duration"],
        "text": transcript["text"],
    }
    if "segment" in granularities:
        segments = enumerate(transcript["segments"])
        answer["segments"] = [_segment(index, segment, parameters.temperature) for index, segment in segments]
    if "word" in granularities:
        answer["words"] = [
            {"word": word["text"], "start": word["start"], "end": word["end"]} for word in transcript["words"]
        ]
    return answer


def _segment(index: int, segment: dict[str, Any], temperature: float) -> dict[str, Any]:
    """Return a segment with all the keys that typed clients require; what the task does not tell is empty or 0."""
    text = segment["text"].encode()
    return {
        "id": index,
        "seek": 0,
        "start": segment["start"],
        "end": segment["end"],
        "text": segment["text"],
        "tokens": [],
        "temperature": temperature,
        "avg_logprob": 0.0,
        "compression_ratio": round(len(text) / len(zlib.compress(text)), 3),
        "no_speech_prob": 0.0,
    }


def _srt(transcript: dict[str, Any]) -> str:
    return "".join(
        f"{number}\n{_clock(cue['start'], ',')} --> {_clock(cue['end'], ',')}\n{_ARROW.sub('->', _line(cue))}\n\n"
        for number, cue in enumerate(transcript["segments"], start=1)
    )


def _vtt(transcript: dict[str, Any]) -> str:
    cues = "".join(
        f"{_clock(cue['start'], '.')} --> {_clock(cue['end'], '.')}\n{_escaped(_line(cue))}\n\n"
        for cue in transcript["segments"]
    )
    return f"WEBVTT\n\n{cues}"


def _line(cue: dict[str, Any]) -> str:
    return " ".join(cue["text"].split())


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _clock(seconds: float, mark: str) -> str:
    rest, milliseconds = divmod(round(1000 * seconds), 1000)
    minutes, s = divmod(rest, 60)
    h, m = divmod(minutes, 60)
    return f"{h:02}:{m:02}:{s:02}{mark}{milliseconds:03}"


# Errors


def _checked(parameters: type[AnyParameters], body: Mapping[str, Any]) -> AnyParameters:
    """Return a request's parameters.

    Raises:
        InvalidInput: one is unknown, missing or wrong; the error names it.
    """
    try:
        return parameters.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    if not first["loc"]:
        raise InvalidInput("every key of the body must be valid Unicode")
    name, *indices = first["loc"]
    field = f"{name}"[:40] + "".join(f"[{index}]" for index in indices if isinstance(index, int))
    if first["type"] == "extra_forbidden":
        known = ", ".join(parameters.model_fields)
        raise InvalidInput(f"unknown parameter {field!r}: this route takes {known}", field=field)
    raise InvalidInput(f"{field}: {first['msg'].removeprefix('Value error, ')}", field=field)


@contextmanager
def _in_the_request_s_terms() -> Iterator[None]:
    """Let errors speak of the request's parameters, in place of the task's keys."""
    try:
        yield
    except ServerError as error:
        for ours, theirs in NAMES.items():
            if error.field is not None and error.field.startswith(ours):
                field = theirs + error.field.removeprefix(ours)
                message = error.message.replace(error.field, field, 1)
                raise type(error)(message, field=field, retry_after=error.retry_after) from error
        raise


def _shape_errors(response: Response) -> Response:
    """Give an error below ``/v1`` this API's shape, wherever in the server it comes from."""
    if response.status_code < 400 or not f"{request.path}/".startswith("/v1/"):
        return response
    told = response.get_json(silent=True)
    if isinstance(told, dict) and isinstance(told.get("error"), str):
        kind = "server_error" if response.status_code >= 500 else "invalid_request_error"
        error = {"message": told["error"], "type": kind, "param": told.get("field"), "code": told.get("code")}
        if response.status_code == 429:
            error["type"] = "rate_limit_error"
        response.set_data(json.dumps({"error": error}, ensure_ascii=False))
    return response


# The description in OpenAPI


def describe_routes(application_interface: ApplicationInterface) -> dict[str, Any]:
    """Return the OpenAPI description of the routes, with what the models that are there take."""
    models = _models(application_interface)
    one = _object(id={"type": "string"}, object={"const": "model"}, created=_COUNT, owned_by={"type": "string"})
    example = _model_object(models[0]) if models else None
    many = _object(object={"const": "list"}, data={"type": "array", "items": one})
    model = _described("A model", "model", 404, answer=json_response("The model", one, example))
    model["parameters"] = [path_parameter("model", "The model's name", models)]
    listed = json_response("The models that embed texts or recognise speech", many)
    return {
        "/v1/models": {"get": _described("All models", "models", answer=listed)},
        "/v1/models/{model}": {"get": model},
        "/v1/embeddings": {"post": _embeddings_described(application_interface)},
        "/v1/audio/transcriptions": {
            "post": _speech_described(
                application_interface, "Turn speech into text", "transcriptions", TranscriptionParameters
            )
        },
        "/v1/audio/translations": {
            "post": _speech_described(
                application_interface, "Turn speech into English text", "translations", TranslationParameters
            )
        },
    }


def _embeddings_described(application: ApplicationInterface) -> JsonObject:
    vector = {"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}]}
    embedding = _object(object={"const": "embedding"}, index=_COUNT, embedding=vector)
    usage = _object(prompt_tokens=_COUNT, total_tokens=_COUNT)
    schema = _object(
        object={"const": "list"}, data={"type": "array", "items": embedding}, model={"type": "string"}, usage=usage
    )
    return _described(
        "Turn texts into vectors",
        "embeddings",
        *RUN_ERRORS,
        body=json_body(_schema(application, EMBEDDING, EmbeddingParameters, _able(application, EMBEDDING))),
        answer=json_response("The vectors, in the order of the texts", schema),
    )


def _speech_described(
    application: ApplicationInterface, summary: str, name: str, parameters: type[TranslationParameters]
) -> JsonObject:
    needed = ["task"] if parameters is TranslationParameters else []
    models = _able(application, SPEECH, *needed)
    schema = _schema(application, SPEECH, parameters, models)
    if not any(_takes(application, SPEECH, model, "timestamps") for model in models):
        schema["properties"]["response_format"]["enum"] = ["json", "text"]
    elif "timestamp_granularities" in schema["properties"]:
        granularities = schema["properties"].pop("timestamp_granularities")
        schema["properties"]["timestamp_granularities[]"] = granularities
    schema["properties"] = {"file": {"type": "string", "format": "binary", "contentMediaType": "audio/*"}} | schema[
        "properties"
    ]
    schema["required"] = ["file", *schema["required"]]
    text = {"schema": {"type": "string"}}
    transcript: JsonObject = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    answer = json_response("The text, in the format that was asked for", transcript, {"text": "good morning"})
    answer["content"] |= {"text/plain": text, "text/vtt": text}
    body = {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    return _described(summary, name, *RUN_ERRORS, body=body, answer=answer)


def _able(application: ApplicationInterface, task: str, *keys: str) -> list[str]:
    """Return the models of a task that take some keys of ``config``."""
    models = application.models_for(task) if task in application.list_tasks() else []
    return [model for model in models if all(_takes(application, task, model, key) for key in keys)]


def _schema(
    application: ApplicationInterface, task: str, parameters: type[Parameters], models: list[str]
) -> JsonObject:
    """Return the schema of a request's parameters, without those that no model takes."""
    schema = parameters.model_json_schema()
    properties = {
        name: _without_null(found)
        for name, found in schema["properties"].items()
        if name not in OPTIONAL or any(_takes(application, task, model, OPTIONAL[name]) for model in models)
    }
    properties["model"] = {"type": "string"} | ({"enum": models} if models else {})
    is_decided = bool(models) and default_model(application, task) in models
    required = [*schema.get("required", []), *([] if is_decided else ["model"])]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _without_null(schema: JsonObject) -> JsonObject:
    choices = [choice for choice in schema.get("anyOf", []) if choice != {"type": "null"}]
    return choices[0] if len(choices) == 1 else {key: value for key, value in schema.items() if key != "title"}


def _described(summary: str, name: str, *errors: int, **parts: Any) -> JsonObject:
    """Return an operation whose errors have this API's shape."""
    described = operation(summary, tag=TAG, operation_id=f"openai_api_{name}", errors=(), **parts)
    for status in {*errors, 500}:
        meaning = "The server is at fault" if status >= 500 else "The request is at fault"
        response = json_response(f"{meaning}: code and message say how", _ERROR)
        if status in (429, 503):
            response["headers"] = {"Retry-After": {"description": "Seconds to wait", "schema": {"type": "integer"}}}
        described["responses"][str(status)] = response
    return described


def _object(**properties: JsonObject) -> JsonObject:
    return {"type": "object", "properties": properties, "required": list(properties)}


_COUNT: JsonObject = {"type": "integer", "minimum": 0}
_ERROR = _object(
    error=_object(
        message={"type": "string"},
        type={"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
        param={"type": ["string", "null"]},
        code={"type": ["string", "null"]},
    )
)
