"""The base API: tasks, models and features below ``/api``."""

from typing import Any

from flask import Flask, Response, jsonify

from feature_extraction_server.core.application import ApplicationInterface
from feature_extraction_server.flask.app import client_waits, read_json_object


def add_routes(application_interface: ApplicationInterface, flask_app: Flask) -> None:
    """Add the routes; the README lists them."""

    def features(task: str, model: str | None = None) -> Response:
        application_interface.resolve(task, model)  # an unknown name is told before the body is read
        return jsonify(application_interface.run(task, model, read_json_object(), is_wanted=client_waits()))

    def start(model: str) -> dict[str, str]:
        application_interface.start(model)
        return {"status": "ok"}

    def stop(model: str) -> dict[str, str]:
        application_interface.stop(model)
        return {"status": "ok"}

    def status(model: str) -> dict[str, Any]:
        return application_interface.status(model)

    def add(rule: str, view: Any, method: str) -> None:
        flask_app.add_url_rule(rule, f"base_api {method} {rule}", view, methods=[method])

    add("/api/tasks/list", lambda: jsonify(application_interface.list_tasks()), "GET")
    add("/api/models/list", lambda: jsonify(application_interface.list_models()), "GET")
    add("/api/models/<model>/tasks/list", lambda model: jsonify(application_interface.tasks_of(model)), "GET")
    add("/api/tasks/<task>/models/list", lambda task: jsonify(application_interface.models_for(task)), "GET")
    add("/api/plugins", lambda: jsonify(application_interface.list_plugins()), "GET")
    add("/api/models/<model>/tasks/<task>/features", features, "POST")
    add("/api/tasks/<task>/models/<model>/features", features, "POST")
    add("/api/tasks/<task>/features", features, "POST")
    add("/api/models/<model>/start", start, "POST")
    add("/api/models/<model>/stop", stop, "POST")
    add("/api/models/<model>/status", status, "GET")
