"""What ``GET /api/tasks/<task>`` and ``GET /api/models/<model>`` tell."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from flask.testing import FlaskClient
from jsonschema import Draft202012Validator

from feature_extraction_server.core.engine import Engine
from feature_extraction_server.flask.app import create_app
from tests.http.conftest import json_of
from tests.http.test_base_api import WIDE
from tests.waiting import wait_until

WITH_SECRETS = '''
"""A model that knows secrets.

Weights: none.
"""
def add_settings(settings_manager):
    add = settings_manager.add_setting
    add(name="MINE_TOKEN", type=str, default="t0p", description="A token")
    add(name="MINE_WORD", type=str, default=None, description="A word", secret=True)
    add(name="MINE_SIZE", type=int, default=3, description="A size", minimum=1)
def load_model(): pass
def image_captioning(image, config): return [["a"]]
'''


def model(client: FlaskClient, name: str) -> Any:
    return json_of(client.get(f"/api/models/{name}"))


def test_task_tells_what_it_does_takes_and_gives(client: FlaskClient) -> None:
    task = json_of(client.get("/api/tasks/image_captioning"))

    assert task["task"] == "image_captioning"
    assert task["description"] == "Generate text captions that describe the visual content of an image."
    assert task["batch_fields"] == ["image"]
    assert list(task["input"]["properties"]) == ["image", "config"]
    assert Draft202012Validator(task["input"]).is_valid({"image": [WIDE]})
    assert not Draft202012Validator(task["input"]).is_valid({"text": "a"})
    assert Draft202012Validator(task["output"]).is_valid(["a caption"])


def test_task_tells_its_models_and_that_none_of_them_is_the_default(client: FlaskClient) -> None:
    task = json_of(client.get("/api/tasks/image_captioning"))

    assert task["models"] == client.get("/api/tasks/image_captioning/models/list").json
    assert task["default_model"] is None


def test_task_tells_its_default_model(build: Callable[..., Engine]) -> None:
    client = create_app(build(DEFAULT_MODEL_IMAGE_CAPTIONING="fake_slow")).test_client()

    assert json_of(client.get("/api/tasks/image_captioning"))["default_model"] == "fake_slow"


def test_hand_written_task_tells_its_docstring_and_its_signature(client: FlaskClient) -> None:
    task = json_of(client.get("/api/tasks/fake_shout"))

    assert task["description"].startswith("A task with a hand-written ``wrap``")
    assert task["input"]["required"] == ["text"]
    assert task["batch_fields"] == []


def test_model_tells_what_it_is_and_what_it_takes(client: FlaskClient) -> None:
    told = model(client, "whisper")

    assert told["description"].startswith("Whisper: the words that are spoken")
    assert told["tasks"] == ["automated_speech_recognition"]
    assert "language" in told["config"]["automated_speech_recognition"]["properties"]


def test_model_that_takes_any_config_says_null_of_it(client: FlaskClient) -> None:
    assert model(client, "fake_echo")["config"]["image_captioning"] is None


def test_model_tells_its_own_settings_and_those_it_shares(client: FlaskClient) -> None:
    settings = {setting["name"]: setting for setting in model(client, "blip")["settings"]}

    assert settings.keys() == {"BLIP_CHECKPOINT", "BLIP_REVISION", "DEVICE", "DTYPE"}
    assert settings["DEVICE"]["value"] == "auto"


def test_model_tells_no_secret(plugin: Callable[..., None], build: Callable[..., Engine]) -> None:
    plugin("models", "mine", WITH_SECRETS)
    given = {"MINE_TOKEN": "s3cr3t", "MINE_WORD": "s3same", "MINE_SIZE": "4"}
    client = create_app(build(**given)).test_client()

    answer = client.get("/api/models/mine")

    settings = {setting["name"]: (setting["value"], setting["secret"]) for setting in json_of(answer)["settings"]}
    assert settings == {"MINE_TOKEN": (None, True), "MINE_WORD": (None, True), "MINE_SIZE": (4, False)}
    assert [word for word in ("t0p", "s3cr3t", "s3same") if word in answer.text] == []


def test_model_tells_its_state_its_memory_and_what_it_has_done(client: FlaskClient) -> None:
    client.post("/api/models/fake_echo/tasks/image_captioning/features", json={"image": [WIDE, WIDE]})
    client.post("/api/models/fake_echo/tasks/fake_shout/features", json={"text": "crash"})

    told = model(client, "fake_echo")

    assert (told["state"], told["queue_depth"], told["pids"]) == ("running", 0, [os.getpid()])
    assert told["memory_bytes"] > 1 << 20
    assert told["state_seconds"] >= 0
    assert told["counts"] == {"loads": 1, "failed_loads": 0, "jobs": 2, "items": 3, "failures": 1}


def test_model_that_is_stopped_holds_no_memory(client: FlaskClient) -> None:
    assert model(client, "fake_echo")["memory_bytes"] is None


def test_failed_load_is_counted(client: FlaskClient) -> None:
    client.post("/api/models/fake_broken/start")
    wait_until(lambda: model(client, "fake_broken")["state"] == "failed")

    assert model(client, "fake_broken")["counts"]["failed_loads"] == 1


@pytest.mark.parametrize("consumer", ["single_thread_consumer", "process_consumer"])
def test_model_tells_the_device_that_its_weights_are_on(
    plugin: Callable[..., None], build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, consumer: str
) -> None:
    plugin("models", "mine", "def load_model():\n    global device\n    device = 'tpu:3'")
    engine = build(MINE_CONSUMER_TYPE=consumer)

    engine.start("mine", wait=True)

    assert engine.status("mine")["device"] == "tpu:3"


@pytest.mark.parametrize("path", ["/api/tasks/nothing", "/api/models/nothing"])
def test_what_there_is_not_is_answered_with_404(client: FlaskClient, path: str) -> None:
    assert client.get(path).status_code == 404
