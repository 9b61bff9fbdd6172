"""The WSGI entry point for gunicorn and its like."""

from __future__ import annotations

import atexit

from flask import Flask

from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.flask.app import create_app
from feature_extraction_server.flask.server import build_engine


def entrypoint() -> Flask:
    """Return the WSGI app. Settings come from the environment and ``.env``.

    Starts no thread and no model, so that it may be called before the workers are forked (``--preload``).
    """
    engine = build_engine(SettingsManager())
    atexit.register(engine.close)
    return create_app(engine)
