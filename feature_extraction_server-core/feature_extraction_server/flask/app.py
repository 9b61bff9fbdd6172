"""The Flask app: api plugins give it routes, and every error leaves it as JSON."""

from __future__ import annotations

import json
import logging
import math
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

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

MAX_NESTING: Final = 100
MAX_DIGITS: Final = 300
_DRAIN_BYTES: Final = 1 << 30
_DRAIN_SECONDS: Final = 60.0
_DRAIN_STALL_SECONDS: Final = 5.0


class _JSONProvider(DefaultJSONProvider):
    """JSON as the standard has it: no NaN and no infinity; text as it is."""

    ensure_ascii = False
    sort_keys = False

    def dumps(self, obj: Any, **kwargs: Any) -> str:
        return super().dumps(obj, **({"allow_nan": False} | kwargs))


def create_app(application: ApplicationInterface) -> Flask:
    """Make the WSGI app: the routes of every api plugin over ``application``, errors as JSON.

    An api plugin whose ``add_routes`` raises is reported as failed; the server works all the same.
    """
    app = Flask(__name__, static_folder=None)
    app.json = _JSONProvider(app)
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False  # an empty name is told as such, not redirected to another route
    app.config["MAX_CONTENT_LENGTH"] = application.settings.max_content_length.get()
    app.register_error_handler(ServerError, _answer_server_error)
    app.register_error_handler(HTTPException, _answer_http_exception)
    app.register_error_handler(Exception, _answer_unexpected_error)
    app.after_request(_read_the_rest)
    for name, api in sorted(application.registry.apis.items()):
        try:
            api.add_routes(application, app)
        except BaseException as error:  # SystemExit too: one api's fault must not stop the others
            if isinstance(error, KeyboardInterrupt):
                raise
            logger.exception("The api plugin %s failed to add its routes", name)
            reason = f"add_routes failed: {type(error).__name__}: {error}"
            application.registry = application.registry.leave_out("apis", name, reason)
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
        text = _read_body().decode("utf-8-sig")
        if not text.strip():
            raise InvalidInput("the body is empty: it must be a JSON object whose keys are the task's input")
        body = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_bounded_int,
        )
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError as error:
        raise InvalidInput(f"the body is not valid JSON: byte {error.start} is not UTF-8") from None
    except ValueError as error:  # malformed, NaN, or a number too large
        raise InvalidInput(f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise InvalidInput("the body must be a JSON object whose keys are the task's input")
    _check_nesting(body)
    return body


def _read_body() -> bytes:
    try:
        data = request.get_data(cache=False)
        # Werkzeug cuts a body of undeclared length off at the limit, without a word.
        if request.content_length is None and len(data) == request.max_content_length:
            too_large = bool(request.environ["wsgi.input"].read(1))
        else:
            too_large = False
    except HTTPException:
        raise
    except Exception as error:  # the server has errors of its own for malformed chunks
        raise InvalidInput(f"the body cannot be read: {type(error).__name__}") from None
    if too_large:
        raise _too_large()
    return data


def _check_nesting(body: dict[str, Any]) -> None:
    """Refuse what recursive code (a JSON encoder, a model's) could fail on later."""
    level: list[Any] = [body]
    for _ in range(MAX_NESTING):
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [value for values in inner for value in values if isinstance(value, (dict, list))]
        if not level:
            return
    raise _too_deep()


def client_waits() -> Callable[[], bool]:
    """Return a function that tells, as long as the current request lasts, whether its client is still connected.

    One that has closed its side of the connection counts as gone. With a server that does not show the connection, or
    over TLS, a client always counts as connected.
    """
    connection = request.environ.get("gunicorn.socket") or request.environ.get("werkzeug.socket")

    def waits() -> bool:
        try:
            return connection is None or connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except (BlockingIOError, ValueError):  # nothing to read; TLS sockets take no flags
            return True
        except OSError:
            return False

    return waits


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _bounded_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"the number {text[:40]}... is too large")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _read_the_rest(response: Response) -> Response:
    response.call_on_close(partial(_drain, request.environ))
    return response


def _drain(environ: dict[str, Any]) -> None:
    """Read what a refused body has left, once the answer is sent.

    A client that sends all of its body before it reads the answer would otherwise see a connection reset. Gunicorn
    itself drains 64 KiB; the development server does all of it, and gives no such socket.
    """
    connection = environ.get("gunicorn.socket")
    if connection is None:
        return
    give_up_at = time.monotonic() + _DRAIN_SECONDS
    rest = _DRAIN_BYTES
    timeout = connection.gettimeout()
    try:
        connection.settimeout(_DRAIN_STALL_SECONDS)
        while rest > 0 and time.monotonic() < give_up_at and (data := environ["wsgi.input"].read(1 << 16)):
            rest -= len(data)
        connection.settimeout(timeout)
    except Exception as error:  # the answer is sent: nobody is left to tell about a client that stalls or leaves
        logger.debug("A refused body was not read to its end: %r", error)


def _answer_server_error(error: ServerError) -> tuple[Response, int, dict[str, str]]:
    body = {"error": _utf8(error.message), "code": error.code}
    if error.field is not None:
        body["field"] = _utf8(error.field)
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


def _utf8(text: str) -> str:
    """Spell out half surrogate pairs, which a client's keys may hold but no answer can."""
    return text.encode("utf-8", "backslashreplace").decode()


def _too_deep() -> InvalidInput:
    return InvalidInput(f"the body is nested too deeply; at most {MAX_NESTING} levels are allowed")


def _too_large() -> TooLarge:
    return TooLarge(f"the body has more than {request.max_content_length} bytes (MAX_CONTENT_LENGTH)")
