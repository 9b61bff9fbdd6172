"""The playground: a page at ``/`` on which every task and model can be tried. It uses the routes of the base API."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from flask import Flask, Response, redirect, request, send_file
from werkzeug.wrappers import Response as AnyResponse

from feature_extraction_server.core.application import ApplicationInterface
from feature_extraction_server.core.errors import NotFound
from feature_extraction_server.flask.openapi import operation, path_parameter

TAG = "playground"
_FOLDER: Final = Path(__file__).parent / "static"
_TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_FILES: Final = sorted(path.name for path in _FOLDER.iterdir() if path.suffix in _TYPES)
# Everything comes from this server, but what the visitor chose, which the page shows by blob URLs.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)


def add_routes(application_interface: ApplicationInterface, flask_app: Flask) -> None:
    """Add the page and its files."""

    def page() -> AnyResponse:
        if not request.environ["PATH_INFO"]:  # the page's links are relative to the slash at the end of a prefix
            return redirect(request.script_root + "/")
        return file("index.html")

    def file(name: str) -> Response:
        if name not in _FILES:
            raise NotFound(f"there is no file {name[:80]!r} here")
        response = send_file(_FOLDER / name, mimetype=_TYPES[Path(name).suffix])
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    for view in (page, file):  # without a key too: the page asks for the visitor's
        vars(view)["is_public"] = True
    flask_app.add_url_rule("/", "playground page", page)
    flask_app.add_url_rule("/playground/<name>", "playground file", file)


def describe_routes(application_interface: ApplicationInterface) -> dict[str, Any]:
    """Return the OpenAPI description of the routes."""
    unchanged = {"304": {"description": "The file has not changed"}}
    page = operation(
        "The playground",
        tag=TAG,
        operation_id="playground_page",
        answer={"description": "An HTML page", "content": {"text/html": {"schema": {"type": "string"}}}},
    )
    file = operation(
        "A file of the playground",
        tag=TAG,
        operation_id="playground_file",
        answer={"description": "The file", "content": {kind: {} for kind in _TYPES.values()}},
        errors=(404, 500),
        parameters=[path_parameter("name", "The file's name", _FILES)],
    )
    for described in (page, file):
        described["responses"] |= unchanged
    return {"/": {"get": page}, "/playground/{name}": {"get": file}}
