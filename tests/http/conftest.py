"""Clients of an app in this process, over an engine with settings of the test's choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from feature_extraction_server.core.engine import Engine
from feature_extraction_server.flask.app import create_app

MakeClient = Callable[..., FlaskClient]


@pytest.fixture
def client_with(build: Callable[..., Engine]) -> MakeClient:
    """``client_with(SETTING=value, ...)`` gives a client of an app in this process."""
    return lambda **settings: create_app(build(**settings)).test_client()


def json_of(response: TestResponse) -> Any:
    """Return an answer's body, which must be JSON."""
    assert response.content_type == "application/json"
    return response.json
