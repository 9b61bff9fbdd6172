"""The Flask app: api plugins give it routes, and every error leaves it as JSON."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

from flask import Flask, Response, jsonify, request
from flask.json.provider import DefaultJSONProvider
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from feature_extraction_server.core.application import ApplicationInterface
from feature_extraction_server.core.errors import (
    InvalidInput,
    NotFound,
    ServerError,
    TooLarge,
    UnsupportedMediaType,
)

logger = logging.getLogger(__name__)


class _JSONProvider(DefaultJSONProvider):
    """JSON as the standard has it: no NaN and no infinity; text as it is."""

    ensure_ascii = False
    sort_keys = False

    def dumps(self, obj: Any, **kwargs: Any) -> str:
        return super().dumps(obj, **({"allow_nan": False} | kwargs))


def create_app(application: ApplicationInterface) -> Flask:
    """Make the WSGI app: the routes of every api plugin over ``application``, errors as JSON.

    An api plugin whose ``add_routes`` raises takes its routes along, not the server.
    """
    app = Flask(__name__, static_folder=None)
    app.json = _JSONProvider(app)
    app.url_map.strict_slashes = False
    app.config["MAX_CONTENT_LENGTH"] = application.settings.max_content_length.get()
    app.register_error_handler(ServerError, _answer_server_error)
    app.register_error_handler(HTTPException, _answer_http_exception)
    app.register_error_handler(Exception, _answer_unexpected_error)
    for name, api in sorted(application.registry.apis.items()):
        try:
            api.add_routes(application, app)
        except Exception:  # one api's fault must not stop the others
            logger.exception("The api plugin %s failed to add its routes", name)
    return app


def read_json_object() -> dict[str, Any]:
    """Return the current request's body, which must be a JSON object.

    Raises:
        UnsupportedMediaType: the body is not declared to be JSON.
        TooLarge: it has more than MAX_CONTENT_LENGTH bytes.
        InvalidInput: it is not JSON, or not an object.
    """
    if not request.is_json:
        given = request.mimetype or "none"
        raise UnsupportedMediaType(
            f"the body must be JSON, sent with the header 'Content-Type: application/json' (it was sent with: {given})"
        )
    try:
        body = json.loads(request.get_data(cache=False), parse_constant=_refuse_constant, parse_float=_finite_float)
    except RequestEntityTooLarge:
        raise _too_large() from None
    except RecursionError:
        raise InvalidInput("the body is nested too deeply") from None
    except ValueError as error:  # malformed, not UTF-8, NaN, or a number with thousands of digits
        raise InvalidInput(f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise InvalidInput("the body must be a JSON object whose keys are the task's input")
    return body


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _answer_server_error(error: ServerError) -> tuple[Response, int, dict[str, str]]:
    body = {"error": error.message, "code": error.code}
    if error.field is not None:
        body["field"] = error.field
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return jsonify(body), error.status, headers


def _answer_http_exception(error: HTTPException) -> tuple[Response, int, dict[str, str]]:
    """Answer what Flask and Werkzeug raise: unknown routes, wrong methods, bodies that cannot be read."""
    if isinstance(error, RequestEntityTooLarge):
        return _answer_server_error(_too_large())
    status = error.code or 500
    if status == 404:
        return _answer_server_error(NotFound(f"there is no route {request.path[:200]}"))
    headers = {name: value for name, value in error.get_headers() if name in ("Allow", "Retry-After", "Location")}
    message = error.description or error.name
    if status == 405:
        message = f"{request.method} is not allowed here; use {headers.get('Allow', 'another method')}"
    body = {"error": message, "code": error.name.lower().replace(" ", "_")}
    return jsonify(body), status, headers


def _answer_unexpected_error(error: Exception) -> tuple[Response, int, dict[str, str]]:
    logger.error("%s %s failed", request.method, request.path, exc_info=error)
    return _answer_server_error(ServerError("the server failed on this request; its log says why"))


def _too_large() -> TooLarge:
    return TooLarge(f"the body has more than {request.max_content_length} bytes (MAX_CONTENT_LENGTH)")
