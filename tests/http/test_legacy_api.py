"""The legacy API: each route, with and without ``/legacy`` before it."""

from __future__ import annotations

from typing import Any

import pytest
from flask.testing import FlaskClient

from tests.http.conftest import MakeClient, json_of
from tests.http.test_base_api import TALL, WIDE

pytestmark = pytest.mark.parametrize("prefix", ["", "/legacy"], ids=["short", "long"])

DEFAULTS = {"DEFAULT_TASK": "image_captioning", "DEFAULT_MODEL_IMAGE_CAPTIONING": "fake_echo"}


def state(client: FlaskClient, model: str) -> str:
    return str(json_of(client.get(f"/api/models/{model}/status"))["state"])


def test_tasks_are_listed(client: FlaskClient, prefix: str) -> None:
    assert client.get(f"{prefix}/tasks").json == client.get("/api/tasks/list").json


@pytest.mark.parametrize(
    "names",
    [
        pytest.param({"task": "image_captioning", "model": "fake_echo"}, id="both named"),
        pytest.param({"task": "image_captioning"}, id="task named"),
        pytest.param({"model": "fake_echo"}, id="model named"),
        pytest.param({}, id="none named"),
        pytest.param({"task": None, "model": None}, id="both null"),
    ],
)
def test_extract_takes_defaults_for_what_is_not_named(client_with: MakeClient, prefix: str, names: Any) -> None:
    client = client_with(**DEFAULTS)

    assert client.post(f"{prefix}/extract", json=names | {"image": WIDE}).json == ["40x30 (255, 0, 0)"]


def test_extract_infers_the_only_task_of_a_model(client: FlaskClient, prefix: str) -> None:
    response = client.post(f"{prefix}/extract", json={"model": "fake_slow", "image": WIDE})

    assert response.status_code == 200
    assert json_of(response)[0].startswith("40 in a batch of 1")


def test_extract_knows_batch_mode(client: FlaskClient, prefix: str) -> None:
    body = {"task": "image_captioning", "model": "fake_echo", "image": [WIDE, TALL]}

    assert client.post(f"{prefix}/extract", json=body).json == [["40x30 (255, 0, 0)"], ["20x60 (0, 0, 255)"]]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param({"task": "image_captioning", "model": "fake_echo"}, id="both named"),
        pytest.param({"task": "image_captioning"}, id="task named"),
        pytest.param({"model": "fake_echo"}, id="model named"),
        pytest.param({}, id="none named"),
    ],
)
def test_load_returns_when_the_model_runs_and_free_when_it_is_stopped(
    client_with: MakeClient, prefix: str, names: Any
) -> None:
    client = client_with(**DEFAULTS)

    loaded = client.post(f"{prefix}/load", json=names)
    running = state(client, "fake_echo")
    freed = client.post(f"{prefix}/free", json=names)
    stopped = state(client, "fake_echo")

    assert (running, stopped) == ("running", "stopped")
    assert loaded.json == freed.json == {"status": "ok"}


def test_load_waits_for_a_model_that_loads_slowly(client_with: MakeClient, prefix: str) -> None:
    client = client_with(FAKE_LOAD_SECONDS="0.3")

    client.post(f"{prefix}/load", json={"model": "fake_slow"})

    assert state(client, "fake_slow") == "running"


def test_load_of_a_broken_model_tells_the_reason(client: FlaskClient, prefix: str) -> None:
    response = client.post(f"{prefix}/load", json={"model": "fake_broken"})

    assert (response.status_code, json_of(response)["code"]) == (503, "model_load_failed")
    assert "no weights here" in json_of(response)["error"]


def test_free_of_a_stopped_model_succeeds(client: FlaskClient, prefix: str) -> None:
    assert client.post(f"{prefix}/free", json={"model": "fake_echo"}).json == {"status": "ok"}


@pytest.mark.parametrize("route", ["load", "free"])
def test_task_that_the_model_lacks_is_refused(client: FlaskClient, prefix: str, route: str) -> None:
    response = client.post(f"{prefix}/{route}", json={"task": "object_detection", "model": "fake_slow"})

    assert (response.status_code, json_of(response)["code"]) == (404, "task_not_supported")
    assert state(client, "fake_slow") == "stopped"
