"""The description of the HTTP interface in OpenAPI 3.1, at ``/openapi.json``, and Swagger UI at ``/docs``."""

from __future__ import annotations

import inspect
import logging
import re
from functools import cache
from importlib import metadata, resources
from typing import Any, Final

from flask import Flask, Response, jsonify, request, send_file

from feature_extraction_server.core.application import ApplicationInterface
from feature_extraction_server.core.describe import task_description
from feature_extraction_server.core.errors import NotFound
from feature_extraction_server.flask.access import HEALTH
from feature_extraction_server.flask.openapi import (
    JsonObject,
    components,
    error_responses,
    json_response,
    operation,
    path_parameter,
)

logger = logging.getLogger(__name__)

TAG = "OpenAPI"
_UI_FOLDER: Final = resources.files("flask_swagger_ui") / "dist"
_UI_FILES: Final = ("swagger-ui.css", "swagger-ui-bundle.js", "favicon-32x32.png")
_START: Final = """\
SwaggerUIBundle({
  url: new URL("openapi.json", document.baseURI).href,
  dom_id: "#swagger-ui",
  deepLinking: true,
  docExpansion: "none",
  defaultModelsExpandDepth: -1,
  validatorUrl: null,
  tryItOutEnabled: true,
});
"""
# The page is found with and without a slash at its end, and below whatever prefix a proxy puts before it.
_PAGE: Final = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Feature Extraction Server: HTTP interface</title>
<base href="{base}">
<link rel="icon" href="docs/files/favicon-32x32.png">
<link rel="stylesheet" href="docs/files/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/files/swagger-ui-bundle.js"></script>
<script src="docs/files/start.js"></script>
</body>
</html>
"""
# Swagger UI sets styles of single elements, and has its icons in data URLs; nothing comes from another host.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self' data:; connect-src 'self'; base-uri 'self'; form-action 'none'; frame-ancestors 'self'"
)


def add_routes(application_interface: ApplicationInterface, flask_app: Flask) -> None:
    """Add ``/openapi.json``, ``/docs`` and the files of Swagger UI."""

    @cache  # no plugin comes or goes while the server runs
    def the_document() -> JsonObject:
        return document(application_interface, flask_app)

    def page() -> Response:
        html = _PAGE.format(base="../" if request.path.endswith("/") else "./")
        return _with_policy(Response(html, mimetype="text/html"))

    def file(name: str) -> Response:
        if name == "start.js":
            return _with_policy(Response(_START, mimetype="text/javascript"))
        if name not in _UI_FILES:
            raise NotFound(f"there is no file {name[:80]!r} here")
        return _with_policy(send_file(str(_UI_FOLDER / name), max_age=86400))

    def description() -> Response:
        return jsonify(the_document())

    for view in (description, page, file):  # without a key too: a browser has none to open a page with
        vars(view)["is_public"] = True
    flask_app.add_url_rule("/openapi.json", "openapi document", description)
    flask_app.add_url_rule("/docs", "openapi page", page)
    flask_app.add_url_rule("/docs/files/<name>", "openapi file", file)


def describe_routes(application_interface: ApplicationInterface) -> dict[str, Any]:
    """Return the OpenAPI description of these routes themselves."""
    document_answer = json_response("An OpenAPI 3.1 document", {"type": "object"})
    html = {"description": "An HTML page", "content": {"text/html": {"schema": {"type": "string"}}}}
    name = path_parameter("name", "The file's name", [*_UI_FILES, "start.js"])
    content: JsonObject = {kind: {} for kind in ("text/css", "text/javascript", "image/png")}
    file = operation(
        "A file of Swagger UI",
        tag=TAG,
        operation_id="openapi_file",
        answer={"description": "The file", "content": content},
        errors=(404, 500),
        parameters=[name],
    )
    file["responses"]["304"] = {"description": "The file has not changed"}
    return {
        "/openapi.json": {
            "get": operation("This document", tag=TAG, operation_id="openapi_document", answer=document_answer)
        },
        "/docs": {"get": operation("Swagger UI", tag=TAG, operation_id="openapi_page", answer=html)},
        "/docs/files/{name}": {"get": file},
    }


def document(application: ApplicationInterface, flask_app: Flask) -> JsonObject:
    """Return the OpenAPI document: the descriptions of all api plugins that have one.

    Args:
        flask_app: has all their routes by now, and knows which of them are for everybody.
    """
    paths: JsonObject = {}
    tags = {task: task_description(application.registry, task) for task in application.list_tasks()}
    api_tags: dict[str, str] = {}
    for name, api in sorted(application.registry.apis.items()):
        for path, item in _described(name, api, application).items():
            paths.setdefault(path, {}).update(item)
            for tag in _tags(item):
                if tag not in tags:
                    api_tags.setdefault(tag, (inspect.getdoc(api) or "").partition("\n")[0])
    _add_access_errors(paths, application, _public_operations(flask_app))
    security: JsonObject = {"security": [{"api_key": []}]} if application.settings.api_keys() else {}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Feature Extraction Server",
            "version": _version(),
            "description": _DESCRIPTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": ".", "description": "This server"}],
        "tags": [{"name": name, "description": text} for name, text in (tags | api_tags).items()],
        "paths": paths,
        "components": components(application)
        | {"securitySchemes": {"api_key": {"type": "http", "scheme": "bearer", "description": "One of API_KEYS"}}},
    } | security


def _add_access_errors(paths: JsonObject, application: ApplicationInterface, public: set[tuple[str, str]]) -> None:
    """Add what a route may answer to whom it does not serve: a foreign page, one without a key, one in haste."""
    has_keys, has_rate = bool(application.settings.api_keys()), bool(application.settings.rate_limit.get())
    for path, item in paths.items():
        for method, described in item.items():
            if isinstance(described, dict) and "responses" in described:
                is_for_everybody = path.startswith(HEALTH) or (path, method) in public
                if has_keys and is_for_everybody:
                    described["security"] = []
                errors = [401] if has_keys and not is_for_everybody else []
                errors += [429] if has_rate and not is_for_everybody else []
                errors += [] if method == "get" else [403]
                described["responses"] = error_responses(errors) | described["responses"]


def _public_operations(flask_app: Flask) -> set[tuple[str, str]]:
    """Return the paths and methods of the views that are for every visitor, spelt as in the document."""
    return {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method.lower())
        for rule in flask_app.url_map.iter_rules()
        if getattr(flask_app.view_functions[rule.endpoint], "is_public", False)
        for method in rule.methods or ()
    }


_DESCRIPTION: Final = """\
AI tasks on images, recordings and texts. Every task has one input and one output, whatever model runs it.

Every error is a JSON object with `error`, a sentence that says what was wrong, `code`, a stable name, and `field` where
one key of the input is at fault. A method that a route does not take is answered with 405 and the header `Allow`.
"""


def _described(name: str, api: Any, application: ApplicationInterface) -> dict[str, Any]:
    describe = getattr(api, "describe_routes", None)
    if describe is None:
        return {}
    try:
        described: dict[str, Any] = describe(application)
    except Exception:  # one plugin's fault must not cost the others their description
        logger.exception("The api plugin %s failed to describe its routes", name)
        return {}
    return described


def _tags(item: JsonObject) -> list[str]:
    return [tag for part in item.values() if isinstance(part, dict) for tag in part.get("tags", [])]


def _version() -> str:
    try:
        return metadata.version("feature_extraction_server-core")
    except metadata.PackageNotFoundError:  # run from a checkout
        return "0"


def _with_policy(response: Response) -> Response:
    response.headers["Content-Security-Policy"] = _POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response
