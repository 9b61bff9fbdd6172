"""The legacy API: ``/extract``, ``/load``, ``/free`` and ``/tasks``, each also below ``/legacy``."""

from typing import Any

from flask import Flask, Response, jsonify

from feature_extraction_server.core.application import ApplicationInterface
from feature_extraction_server.core.errors import InvalidInput
from feature_extraction_server.flask.app import client_waits, read_json_object


def add_routes(application_interface: ApplicationInterface, flask_app: Flask) -> None:
    """Add the routes; the README lists them."""

    def extract() -> Response:
        body = read_json_object()
        task, model = _pop_name(body, "task"), _pop_name(body, "model")
        return jsonify(application_interface.run(task, model, body, is_wanted=client_waits()))

    def load() -> dict[str, str]:
        application_interface.start(_named_model(), wait=True)
        return {"status": "ok"}

    def free() -> dict[str, str]:
        application_interface.stop(_named_model(), wait=True)
        return {"status": "ok"}

    def tasks() -> Response:
        return jsonify(application_interface.list_tasks())

    def _named_model() -> str:
        body = read_json_object()
        task, model = _pop_name(body, "task"), _pop_name(body, "model")
        for key in body:
            raise InvalidInput(f"unknown key {key[:40]!r}: this route takes task and model", field=key[:40])
        if model is None or task is not None:
            _, model = application_interface.resolve(task, model)
        application_interface.require_model(model)
        return model

    for prefix in ("", "/legacy"):
        flask_app.add_url_rule(f"{prefix}/extract", f"legacy_api extract {prefix}", extract, methods=["POST"])
        flask_app.add_url_rule(f"{prefix}/load", f"legacy_api load {prefix}", load, methods=["POST"])
        flask_app.add_url_rule(f"{prefix}/free", f"legacy_api free {prefix}", free, methods=["POST"])
        flask_app.add_url_rule(f"{prefix}/tasks", f"legacy_api tasks {prefix}", tasks, methods=["GET"])


def _pop_name(body: dict[str, Any], key: str) -> str | None:
    """Take a task's or a model's name out of the body; absent and null mean the default."""
    name = body.pop(key, None)
    if name is not None and not isinstance(name, str):
        raise InvalidInput(f"{key} must be a string", field=key)
    return name
