"""The Flask app: api plugins give it routes, and every error leaves it as JSON."""

from __future__ import annotations

import logging
import math
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from flask import Flask, Request, Response, jsonify, request
from flask.json.provider import DefaultJSONProvider
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.routing import MapAdapter

from feature_extraction_server.core.application import ApplicationInterface
from feature_extraction_server.core.errors import NotFound, ServerError
from feature_extraction_server.core.to_json import to_json
from feature_extraction_server.core.tracking import current
from feature_extraction_server.flask.access import add_access_control, refuse_foreign_page
from feature_extraction_server.flask.addresses import Addresses
from feature_extraction_server.flask.request_body import body_too_large
from feature_extraction_server.flask.request_log import with_request_log
from feature_extraction_server.flask.tracing import tracing

logger = logging.getLogger(__name__)

#: By which an app's ``extensions`` have its application interface.
EXTENSION: Final = "feature_extraction_server"
_DRAIN_BYTES: Final = 1 << 30
_DRAIN_SECONDS: Final = 60.0
_DRAIN_STALL_SECONDS: Final = 5.0


class _JSONProvider(DefaultJSONProvider):
    """JSON as the standard has it: no NaN and no infinity; text as it is."""

    ensure_ascii = False
    sort_keys = False

    def dumps(self, obj: Any, **kwargs: Any) -> str:
        return super().dumps(obj, **({"allow_nan": False} | kwargs))

    def response(self, *args: Any, **kwargs: Any) -> Response:
        data = to_json(self._prepare_response_obj(args, kwargs), self.default)
        return Response(data + b"\n", mimetype=self.mimetype)


class _App(Flask):
    """Refuses what foreign pages send before anything else, and looks up once where an address leads.

    A hook of Flask's would cost all other requests more.
    """

    origins: frozenset[str] = frozenset()
    addresses: Addresses

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        if request is None:
            return super().create_url_adapter(None)
        return self.addresses.of(request, super().create_url_adapter)

    def dispatch_request(self) -> Any:
        try:
            return super().dispatch_request()
        except Exception:
            raise
        except BaseException as error:
            # On the main thread, it is what gunicorn's signals raise. Else a plugin has called sys.exit(), say.
            if threading.current_thread() is threading.main_thread():
                raise
            raise RuntimeError(f"the view raised {type(error).__name__}: {error}") from error

    def preprocess_request(self) -> Any:
        if (record := current.get()) is not None and record.origin is not None:
            refuse_foreign_page(record.origin, self.origins)
        return super().preprocess_request()


def create_app(application: ApplicationInterface) -> Flask:
    """Make the WSGI app: the routes of every api plugin over ``application``, errors as JSON.

    An api plugin whose ``add_routes`` raises is reported as failed; the server works all the same.
    """
    app = _App(__name__, static_folder=None)
    app.extensions[EXTENSION] = application
    app.origins = application.settings.cors_origins()
    app.addresses = Addresses()
    app.json = _JSONProvider(app)
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False  # an empty name is told as such, not redirected to another route
    app.config["MAX_CONTENT_LENGTH"] = application.settings.max_content_length.get()
    app.register_error_handler(ServerError, _answer_server_error)
    app.register_error_handler(HTTPException, _answer_http_exception)
    app.register_error_handler(Exception, _answer_unexpected_error)
    app.after_request(_read_the_rest)
    add_access_control(app, application.settings)
    for name, api in sorted(application.registry.apis.items()):
        try:
            api.add_routes(application, app)
        except BaseException as error:  # SystemExit too: one api's fault must not stop the others
            if isinstance(error, KeyboardInterrupt):
                raise
            logger.exception("The api plugin %s failed to add its routes", name)
            reason = f"add_routes failed: {type(error).__name__}: {error}"
            application.registry = application.registry.leave_out("apis", name, reason)
    log_access = application.settings.access_log.get()
    logged = with_request_log(app.wsgi_app, log_access=log_access, trace=tracing(application))
    app.wsgi_app = logged  # type: ignore[method-assign,assignment]  # as Flask advises
    return app


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


def _read_the_rest(response: Response) -> Response:
    # What was answered with success was read; to ask the connection costs system calls.
    if response.status_code >= 400:
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
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return jsonify(error.body()), error.status, headers


def _answer_http_exception(error: HTTPException) -> tuple[Response, int, dict[str, str]]:
    """Answer what Flask and Werkzeug raise: unknown routes, wrong methods, bodies that cannot be read."""
    if isinstance(error, RequestEntityTooLarge):
        return _answer_server_error(body_too_large())
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
