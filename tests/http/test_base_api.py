"""The base API: every route, batch mode of every task, defaults, and a model's life."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flask.testing import FlaskClient
from PIL import Image

from tests.conftest import encode_image
from tests.http.conftest import MakeClient, json_of
from tests.media_files import encode, recording

WIDE = encode_image(Image.new("RGB", (40, 30), "red"))
TALL = encode_image(Image.new("RGB", (20, 60), "blue"))
SHORT = encode(recording([0.0] * 80))
LONG = encode(recording([0.0] * 160))

ONLY_TASK = """
from feature_extraction_server.core.task import TaskSpec, TextField
wrap = TaskSpec(description="Echo.", inputs={"text": TextField("What to say")}, output=str).wrap
"""
ONLY_MODEL = """
def load_model(): pass
def only_task(text): return text
"""


def features(client: FlaskClient, task: str, payload: Any) -> Any:
    response = client.post(f"/api/tasks/{task}/models/fake_echo/features", json=payload)

    assert response.status_code == 200, response.json
    return response.json


# Lists


@pytest.mark.parametrize(
    ("path", "names"),
    [
        pytest.param(
            "/api/tasks/list",
            {
                "automated_speech_recognition",
                "conditional_image_captioning",
                "image_captioning",
                "object_detection",
                "zero_shot_image_classification",
            },
            id="tasks",
        ),
        pytest.param("/api/models/list", {"fake_broken", "fake_echo", "fake_slow"}, id="models"),
        pytest.param("/api/models/fake_slow/tasks/list", {"image_captioning"}, id="tasks of a model"),
        pytest.param("/api/tasks/fake_shout/models/list", {"fake_echo"}, id="models of a task"),
    ],
)
def test_list_is_sorted_and_complete(client: FlaskClient, path: str, names: set[str]) -> None:
    found = json_of(client.get(path))

    assert found == sorted(found)
    assert names <= set(found)


def test_model_is_not_listed_for_a_task_that_it_lacks(client: FlaskClient) -> None:
    assert "fake_slow" not in json_of(client.get("/api/tasks/object_detection/models/list"))


def test_plugins_are_listed_with_their_state(client: FlaskClient) -> None:
    plugins = json_of(client.get("/api/plugins"))

    assert {"kind": "models", "name": "fake_echo", "version": None, "state": "loaded", "error": None} in plugins
    assert {plugin["kind"] for plugin in plugins} == {"apis", "consumers", "models", "tasks"}


@pytest.mark.parametrize("path", ["/api/tasks/list", "/api/plugins"])
def test_head_is_answered_like_get_without_a_body(client: FlaskClient, path: str) -> None:
    response = client.head(path)

    assert (response.status_code, response.content_type, response.data) == (200, "application/json", b"")


def test_options_names_the_methods(client: FlaskClient) -> None:
    response = client.options("/api/models/fake_echo/start")

    assert response.status_code == 200
    assert response.allow.as_set() == {"options", "post"}


@pytest.mark.parametrize(
    "path",
    [
        "/api/models/fake_echo/tasks/image_captioning/features",
        "/api/tasks/image_captioning/models/fake_echo/features",
        "/api/tasks/image_captioning/models/fake_echo/features/",
    ],
)
def test_features_come_from_either_route(client: FlaskClient, path: str) -> None:
    assert client.post(path, json={"image": WIDE}).json == ["40x30 (255, 0, 0)"]


# Batch mode


@pytest.mark.parametrize(
    ("task", "payload", "expected"),
    [
        pytest.param("image_captioning", {"image": WIDE}, ["40x30 (255, 0, 0)"], id="captioning, one"),
        pytest.param(
            "image_captioning",
            {"image": [WIDE, TALL]},
            [["40x30 (255, 0, 0)"], ["20x60 (0, 0, 255)"]],
            id="captioning, two",
        ),
        pytest.param("image_captioning", {"image": [WIDE]}, [["40x30 (255, 0, 0)"]], id="captioning, a list of one"),
        pytest.param("image_captioning", {"image": []}, [], id="captioning, none"),
        pytest.param(
            "conditional_image_captioning", {"image": WIDE, "text": "a"}, ["40x30"], id="conditional captioning, one"
        ),
        pytest.param(
            "conditional_image_captioning",
            {"image": [WIDE, TALL], "text": ["a", "b"]},
            [["40x30"], ["20x60"]],
            id="conditional captioning, two of each",
        ),
        pytest.param(
            "conditional_image_captioning",
            {"image": [WIDE, TALL], "text": "a"},
            [["40x30"], ["20x60"]],
            id="conditional captioning, one text for all",
        ),
        pytest.param(
            "conditional_image_captioning",
            {"image": WIDE, "text": ["a", "b"]},
            [["40x30"], ["40x30"]],
            id="conditional captioning, one image for all",
        ),
        pytest.param(
            "conditional_image_captioning", {"image": [], "text": []}, [], id="conditional captioning, none of either"
        ),
        pytest.param(
            "conditional_image_captioning", {"image": [], "text": "a"}, [], id="conditional captioning, no image"
        ),
        pytest.param(
            "conditional_image_captioning", {"image": WIDE, "text": []}, [], id="conditional captioning, no text"
        ),
        pytest.param(
            "automated_speech_recognition", {"audio": SHORT}, "80 samples at 8000 Hz", id="speech recognition, one"
        ),
        pytest.param(
            "automated_speech_recognition",
            {"audio": [SHORT, LONG]},
            ["80 samples at 8000 Hz", "160 samples at 8000 Hz"],
            id="speech recognition, two",
        ),
        pytest.param("automated_speech_recognition", {"audio": []}, [], id="speech recognition, none"),
        pytest.param(
            "zero_shot_image_classification",
            {"image": WIDE, "classes": ["a", "b"]},
            [0.5, 0.5],
            id="classification, one",
        ),
        pytest.param(
            "zero_shot_image_classification",
            {"image": [WIDE, TALL], "classes": ["a"]},
            [[1.0], [1.0]],
            id="classification, two",
        ),
        pytest.param("zero_shot_image_classification", {"image": [], "classes": ["a"]}, [], id="classification, none"),
        pytest.param(
            "object_detection",
            {"image": WIDE},
            {"boxes": [[0, 0, 40, 30]], "labels": ["picture"], "scores": [1]},
            id="detection, one",
        ),
        pytest.param(
            "object_detection",
            {"image": [TALL]},
            [{"boxes": [[0, 0, 20, 60]], "labels": ["picture"], "scores": [1]}],
            id="detection, a list of one",
        ),
        pytest.param("object_detection", {"image": []}, [], id="detection, none"),
    ],
)
def test_result_has_the_shape_of_the_input(client: FlaskClient, task: str, payload: Any, expected: Any) -> None:
    assert features(client, task, payload) == expected


@pytest.mark.parametrize("config", [pytest.param(None, id="null"), pytest.param({}, id="empty")])
@pytest.mark.parametrize(
    ("task", "payload"),
    [
        ("image_captioning", {"image": WIDE}),
        ("conditional_image_captioning", {"image": WIDE, "text": "a"}),
        ("automated_speech_recognition", {"audio": SHORT}),
        ("zero_shot_image_classification", {"image": WIDE, "classes": ["a"]}),
        ("object_detection", {"image": WIDE}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_config_that_holds_nothing_counts_as_absent(client: FlaskClient, task: str, payload: Any, config: Any) -> None:
    assert features(client, task, payload | {"config": config}) == features(client, task, payload)


def test_more_items_than_a_batch_holds_are_answered_in_order(client_with: MakeClient) -> None:
    client = client_with(MAX_BATCH_SIZE="3")
    images = [encode_image(Image.new("RGB", (width, 1))) for width in range(2, 12)]

    response = client.post("/api/tasks/image_captioning/models/fake_slow/features", json={"image": images})

    assert [caption[0].split(",")[0] for caption in json_of(response)] == [
        f"{width} in a batch of {1 if width == 11 else 3}" for width in range(2, 12)
    ]


# Defaults


def test_default_model_of_a_task_is_taken(client_with: MakeClient) -> None:
    client = client_with(DEFAULT_MODEL_IMAGE_CAPTIONING="fake_echo")

    response = client.post("/api/tasks/image_captioning/features", json={"image": WIDE})

    assert response.json == ["40x30 (255, 0, 0)"]


def test_only_model_of_a_task_is_its_default(plugin: Callable[[str, str, str], None], client_with: MakeClient) -> None:
    plugin("tasks", "only_task", ONLY_TASK)
    plugin("models", "only_model", ONLY_MODEL)

    response = client_with().post("/api/tasks/only_task/features", json={"text": "hello"})

    assert response.json == "hello"


def test_task_without_a_model_is_told_so(plugin: Callable[[str, str, str], None], client_with: MakeClient) -> None:
    plugin("tasks", "only_task", ONLY_TASK)

    response = client_with().post("/api/tasks/only_task/features", json={"text": "hello"})

    assert (response.status_code, json_of(response)["code"]) == (400, "no_default")
    assert "none is installed" in json_of(response)["error"]


# A model's life


def test_model_goes_from_stopped_to_running_and_back(client: FlaskClient) -> None:
    def state() -> str:
        return str(json_of(client.get("/api/models/fake_echo/status"))["state"])

    before = state()
    started = client.post("/api/models/fake_echo/start")
    client.post("/load", json={"model": "fake_echo"})  # waits until it runs
    running = state()
    stopped = client.post("/api/models/fake_echo/stop")
    client.post("/free", json={"model": "fake_echo"})  # waits until it is stopped

    assert (before, running, state()) == ("stopped", "running", "stopped")
    assert started.json == stopped.json == {"status": "ok"}


def test_status_tells_more_than_the_state(client: FlaskClient) -> None:
    status = json_of(client.get("/api/models/fake_echo/status"))

    assert status["model"] == "fake_echo"
    assert status["error"] is None
    assert status["queue_depth"] == 0
    assert status["consumer_type"] == "single_thread_consumer"


@pytest.mark.parametrize("route", ["start", "stop"])
def test_start_and_stop_may_be_repeated(client: FlaskClient, route: str) -> None:
    answers = [client.post(f"/api/models/fake_echo/{route}") for _ in range(3)]

    assert [(answer.status_code, answer.json) for answer in answers] == [(200, {"status": "ok"})] * 3


def test_request_starts_a_stopped_model(client: FlaskClient) -> None:
    features(client, "image_captioning", {"image": WIDE})

    assert json_of(client.get("/api/models/fake_echo/status"))["state"] == "running"


def test_stopped_model_is_started_again_by_a_request(client: FlaskClient) -> None:
    features(client, "image_captioning", {"image": WIDE})
    client.post("/api/models/fake_echo/stop")

    assert features(client, "image_captioning", {"image": WIDE}) == ["40x30 (255, 0, 0)"]


def test_failed_model_shows_the_reason_in_its_status(client: FlaskClient) -> None:
    client.post("/api/tasks/image_captioning/models/fake_broken/features", json={"image": WIDE})

    status = json_of(client.get("/api/models/fake_broken/status"))

    assert status["state"] == "failed"
    assert "no weights here" in status["error"]
