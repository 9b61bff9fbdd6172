"""The vitrivr API as vitrivr-engine uses it: its paths, its spellings, its bodies and the answers that it can read."""

from __future__ import annotations

import base64
import importlib
import json
import re
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import numpy as np
import pytest
from flask.testing import FlaskClient
from PIL import Image
from werkzeug.test import TestResponse

from feature_extraction_server.apis.vitrivr_api import as_object
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.setup import build_engine
from tests.conftest import encode_image
from tests.http.conftest import MakeClient, json_of
from tests.media_files import encode, recording
from tests.waiting import TIMEOUT_S, wait_until

TASK_SOURCE = """
from feature_extraction_server.core.task import {field}, ConfigField, FiniteFloat, TaskSpec

task = TaskSpec(
    description="A vector.", inputs={{"{key}": {field}("It"), "config": ConfigField()}}, output=list[FiniteFloat]
)
wrap = task.wrap
"""
# The vectors are the picture's size and the text's codes. A call ends when the test lets it, if it is to be held.
MODEL_SOURCE = """
import threading

is_open = threading.Event()
is_open.set()

def load_model():
    pass

def a_picture_embedding(image, config):
    assert is_open.wait(60)
    return [[picture.width, picture.height] for picture in image]

def a_text_embedding(text, config):
    return [[float(ord(letter)) for letter in one] for one in text]
"""
FEATURES = (
    "clip_image=a_picture_embedding:my_model, clip_text=a_text_embedding,asr=automated_speech_recognition:fake_echo,"
    "ocr=image_captioning:fake_echo,boxes=object_detection:fake_echo,lost=nonsense,slow=image_captioning:fake_slow,"
    "shout=fake_shout:fake_echo"
)


@pytest.fixture
def my_model(plugin: Callable[[str, str, str], None]) -> Iterator[Any]:
    """The module of a model ``my_model`` with two embedding tasks; ``my_model.is_open.clear()`` holds its calls."""
    plugin("tasks", "a_picture_embedding", TASK_SOURCE.format(field="ImageField", key="image"))
    plugin("tasks", "a_text_embedding", TASK_SOURCE.format(field="TextField", key="text"))
    plugin("models", "my_model", MODEL_SOURCE)
    module = importlib.import_module("feature_extraction_server.models.my_model")
    yield module
    module.is_open.set()


@pytest.fixture
def vitrivr_with(client_with: MakeClient, my_model: Any) -> MakeClient:
    """``vitrivr_with(SETTING=value, ...)`` gives a client; answers are held as long as it takes."""
    return lambda **settings: client_with(**({"VITRIVR_FEATURES": FEATURES, "VITRIVR_POLL_HOLD": "15"} | settings))


@pytest.fixture
def vitrivr(vitrivr_with: MakeClient) -> FlaskClient:
    return vitrivr_with()


def image_url(width: int = 40, height: int = 30) -> str:
    return "data:image/png;base64," + encode_image(Image.new("RGB", (width, height), "red"))


def audio_url() -> str:
    return "data:audio/wav;base64," + encode(recording(np.zeros(12)))


def text_url(text: str) -> str:
    return "data:text/plain;charset=utf-8," + base64.b64encode(text.encode()).decode()


def extract(client: FlaskClient, feature: str, body: str | bytes, **options: Any) -> TestResponse:
    return client.post(f"/extract/{feature}", data=body, content_type="application/x-www-form-urlencoded", **options)


def form(url: str) -> str:
    return "data=" + quote_plus(url)


# Jobs


@pytest.mark.parametrize(
    ("task", "model", "body", "result"),
    [
        ("image-captioning", "fake-echo", {"image": image_url()}, {"caption": "40x30 (255, 0, 0)"}),
        ("image_captioning", "fake_echo", {"image": image_url()}, {"caption": "40x30 (255, 0, 0)"}),
        (
            "conditional-image-captioning",
            "fake-echo",
            {"image": image_url(), "text": "a"},
            {"caption": "40x30"},
        ),
        (
            "automated-speech-recognition",
            "fake-echo",
            {"audio": audio_url()},
            {"transcript": "12 samples at 8000 Hz"},
        ),
        (
            "zero-shot-image-classification",
            "fake-echo",
            {"image": image_url(), "classes": ["a", "b"]},
            {"probabilities": [0.5, 0.5]},
        ),
        (
            "object-detection",
            "fake-echo",
            {"image": image_url()},
            {"boxes": [[0, 0, 40, 30]], "labels": ["picture"], "scores": [1.0]},
        ),
        ("a-picture-embedding", "my-model", {"image": image_url(), "config": {}}, {"embedding": [40.0, 30.0]}),
        ("a-text-embedding", "my-model", {"text": "ab"}, {"embedding": [97.0, 98.0]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_job_s_result_is_an_object_of_its_task(
    vitrivr: FlaskClient, task: str, model: str, body: Any, result: Any
) -> None:
    accepted = vitrivr.post(f"/api/tasks/{task}/{model}/jobs", json=body)
    told = json_of(accepted)
    answers = [json_of(vitrivr.get(f"/api/tasks/{task}/jobs/{told['id']}")) for _ in range(2)]

    assert (accepted.status_code, told.keys(), told["status"]) == (200, {"id", "status"}, "starting")
    assert answers == [{"status": "complete", "result": result}] * 2


def test_a_batched_job_s_result_is_a_list_of_objects_in_the_input_s_order(vitrivr: FlaskClient) -> None:
    body = {"image": [image_url(width) for width in (1, 2, 3)]}

    id = json_of(vitrivr.post("/api/tasks/a-picture-embedding/batched/my-model/jobs", json=body))["id"]

    assert json_of(vitrivr.get(f"/api/tasks/a-picture-embedding/batched/jobs/{id}")) == {
        "status": "complete",
        "result": [{"embedding": [width, 30.0]} for width in (1, 2, 3)],
    }


def test_a_question_for_a_result_is_held_until_it_is_there(vitrivr: FlaskClient, my_model: Any) -> None:
    my_model.is_open.clear()
    id = json_of(vitrivr.post("/api/tasks/a-picture-embedding/my-model/jobs", json={"image": image_url()}))["id"]
    other = vitrivr.application.test_client()

    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(other.get, f"/api/tasks/a-picture-embedding/jobs/{id}")
        wait_until(lambda: json_of(vitrivr.get("/api/models/my_model/status"))["running_jobs"] == 1)
        assert not held.done()
        my_model.is_open.set()

        assert json_of(held.result(TIMEOUT_S))["status"] == "complete"


def test_a_question_is_answered_with_running_when_it_was_held_long_enough(
    vitrivr_with: MakeClient, my_model: Any
) -> None:
    vitrivr = vitrivr_with(VITRIVR_POLL_HOLD="0")
    my_model.is_open.clear()

    ids = [
        json_of(vitrivr.post("/api/tasks/a-picture-embedding/my-model/jobs", json={"image": image_url()}))["id"]
        for _ in range(2)
    ]

    assert [json_of(vitrivr.get(f"/api/tasks/a-picture-embedding/jobs/{id}")) for id in ids] == [
        {"status": "running", "result": None}
    ] * 2


def test_a_queued_job_is_starting(vitrivr_with: MakeClient, my_model: Any) -> None:
    vitrivr = vitrivr_with(VITRIVR_POLL_HOLD="0", MAX_BATCH_SIZE="1")
    my_model.is_open.clear()

    ids = [
        json_of(vitrivr.post("/api/tasks/a-picture-embedding/my-model/jobs", json={"image": image_url()}))["id"]
        for _ in range(3)
    ]

    assert json_of(vitrivr.get(f"/api/tasks/a-picture-embedding/jobs/{ids[2]}"))["status"] == "starting"


def test_a_job_that_fails_is_told_as_failed(vitrivr: FlaskClient) -> None:
    id = json_of(vitrivr.post("/api/tasks/image-captioning/fake-echo/jobs", json={"image": "no picture"}))["id"]

    assert json_of(vitrivr.get(f"/api/tasks/image-captioning/jobs/{id}")) == {"status": "failed", "result": None}


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("nonsense/fake-echo", {}, 404, "task_not_found"),
        ("image-captioning/nobody", {}, 404, "model_not_found"),
        ("image-captioning/whisper", {}, 404, "task_not_supported"),
        ("image-captioning/fake-echo", {}, 400, "invalid_input"),
        ("image-captioning/fake-echo", {"image": ["x"]}, 400, "invalid_input"),
        ("image-captioning/batched/fake-echo", {"image": "x"}, 400, "invalid_input"),
    ],
    ids=["unknown task", "unknown model", "model of other tasks", "missing key", "a list", "no list"],
)
def test_a_job_that_cannot_be_is_refused_at_once(
    vitrivr: FlaskClient, path: str, body: Any, status: int, code: str
) -> None:
    response = vitrivr.post(f"/api/tasks/{path}/jobs", json=body)

    assert (response.status_code, json_of(response)["code"]) == (status, code)


@pytest.mark.parametrize("path", ["object-detection/jobs", "image-captioning/batched/jobs"])
def test_a_job_is_found_only_where_it_was_handed_in(vitrivr: FlaskClient, path: str) -> None:
    id = json_of(vitrivr.post("/api/tasks/image-captioning/fake-echo/jobs", json={"image": image_url()}))["id"]

    assert vitrivr.get(f"/api/tasks/{path}/{id}").status_code == 404
    assert vitrivr.get("/api/tasks/image-captioning/jobs/nonsense").status_code == 404


def test_a_job_that_the_jobs_api_took_as_a_list_is_told_as_one(vitrivr: FlaskClient) -> None:
    body = {"image": [image_url(width) for width in (1, 2)], "config": {}}
    id = json_of(vitrivr.post("/api/tasks/image_captioning/models/fake_echo/jobs", json=body))["id"]

    answers = [json_of(vitrivr.get(f"/api/tasks/image_captioning/{way}jobs/{id}")) for way in ("", "batched/")]

    assert answers[0] == answers[1]
    assert [list(one) for one in answers[0]["result"]] == [["caption"], ["caption"]]


def test_both_apis_see_the_same_jobs(vitrivr: FlaskClient) -> None:
    id = json_of(vitrivr.post("/api/tasks/image-captioning/fake-echo/jobs", json={"image": image_url()}))["id"]

    assert json_of(vitrivr.get(f"/api/jobs/{id}?wait=60"))["result"] == ["40x30 (255, 0, 0)"]


@pytest.mark.parametrize(
    ("task", "result", "expected"),
    [
        ("image_captioning", [], {"caption": ""}),
        ("optical_character_recognition", "a text", {"text": "a text"}),
        ("optical_character_recognition", [{"text": "a"}, {"text": "b"}], {"text": "a\nb"}),
        ("automated_speech_recognition", {"text": "a", "segments": []}, {"transcript": "a"}),
        ("text_embedding", {"embedding": [0.5], "tokens": 3}, {"embedding": [0.5], "tokens": 3}),
        ("zero_shot_object_detection", {"boxes": [[0.4, 1.6, 2.5, 3]]}, {"boxes": [[0, 2, 2, 3]]}),
        ("audio_diarization", {"segments": []}, {"segments": []}),
        ("counting", 3, {"result": 3}),
    ],
    ids=[
        "no caption",
        "text",
        "lines",
        "transcript with times",
        "vector with tokens",
        "corners between pixels",
        "an object",
        "a number",
    ],
)
def test_result_is_wrapped_by_its_task_and_kind(task: str, result: Any, expected: Any) -> None:
    assert as_object(task, result) == expected


# Lists, and routes beside those of other apis


@pytest.mark.parametrize(
    ("path", "like"),
    [
        ("/api/tasks", "/api/tasks/list"),
        ("/api/models", "/api/models/list"),
        ("/api/tasks/image-captioning/models", "/api/tasks/image_captioning/models/list"),
        ("/api/models/fake-echo/tasks", "/api/models/fake_echo/tasks/list"),
    ],
)
def test_lists_are_those_of_the_base_api(vitrivr: FlaskClient, path: str, like: str) -> None:
    answer = json_of(vitrivr.get(path))

    assert answer == json_of(vitrivr.get(like))
    assert answer


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/tasks/image_captioning/models/fake_echo/jobs", 202),
        ("/api/tasks/image_captioning/fake_echo/jobs", 200),
        ("/api/tasks/image_captioning/models/fake_echo/features", 200),
    ],
)
def test_routes_of_the_apis_do_not_hide_each_other(vitrivr: FlaskClient, path: str, status: int) -> None:
    assert vitrivr.post(path, json={"image": image_url()}).status_code == status


def test_a_default_model_s_jobs_and_batched_jobs_have_routes_of_their_own(vitrivr_with: MakeClient) -> None:
    vitrivr = vitrivr_with(DEFAULT_MODEL_IMAGE_CAPTIONING="fake_echo")

    by_default = vitrivr.post("/api/tasks/image_captioning/jobs", json={"image": image_url()})
    batched = vitrivr.post("/api/tasks/image_captioning/batched/fake_echo/jobs", json={"image": [image_url()]})

    assert (by_default.status_code, batched.status_code) == (202, 200)


# External features


@pytest.mark.parametrize("path", ["/extract", "//extract"])
@pytest.mark.parametrize(
    ("feature", "url", "answer"),
    [
        ("clip_image", image_url(), [40.0, 30.0]),
        ("clip_text", text_url("zoë"), [122.0, 111.0, 235.0]),
        ("asr", audio_url(), {"text": "12 samples at 8000 Hz"}),
        ("ocr", image_url(), {"text": "40x30 (255, 0, 0)"}),
        ("boxes", image_url(), {"boxes": [[0.0, 0.0, 40.0, 30.0]], "labels": ["picture"], "scores": [1.0]}),
    ],
    ids=["clip_image", "clip_text", "asr", "ocr", "another one"],
)
def test_a_feature_is_a_list_of_numbers_or_a_text(
    vitrivr: FlaskClient, path: str, feature: str, url: str, answer: Any
) -> None:
    response = extract(vitrivr, feature, form(url), environ_overrides={"PATH_INFO": f"{path}/{feature}"})

    assert (response.status_code, json_of(response)) == (200, answer)


@pytest.mark.parametrize(
    "body",
    [
        form(image_url()),
        re.sub("%..", lambda escaped: escaped[0].lower(), form(image_url())),
        "data=" + image_url(),
        image_url(),
        form(image_url().partition(",")[2]),
        "more=1&" + form(image_url()) + "&yet=more",
        "metadata=1&data&" + form(image_url()) + "&data=another",
    ],
    ids=[
        "escaped",
        "escaped in lower case",
        "not escaped",
        "no field",
        "base64 alone",
        "among other fields",
        "among fields of like names",
    ],
)
def test_a_data_url_is_read_however_a_release_of_the_client_writes_it(vitrivr: FlaskClient, body: str) -> None:
    assert json_of(extract(vitrivr, "clip_image", body)) == [40.0, 30.0]


def test_a_picture_of_many_megabytes_passes(vitrivr: FlaskClient) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), dtype=np.uint8)
    body = form("data:image/png;base64," + encode_image(Image.fromarray(noise), compress_level=0))
    assert len(body) > 7_500_000

    assert json_of(extract(vitrivr, "clip_image", body)) == [1400.0, 1400.0]


def test_form_of_very_many_fields_takes_little_more_memory_than_its_body(vitrivr: FlaskClient) -> None:
    body = b"&" * 4_000_000
    tracemalloc.start()

    try:
        refused = extract(vitrivr, "clip_image", body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert refused.status_code == 400
    assert peak < 5 * len(body)


def test_body_that_is_compressed_in_an_unknown_way_is_refused_as_described(vitrivr: FlaskClient) -> None:
    response = extract(vitrivr, "clip_image", form(image_url()), headers={"Content-Encoding": "br"})
    described = json_of(vitrivr.get("/openapi.json"))["paths"]["/extract/clip_image"]["post"]

    assert response.status_code == 415
    assert "415" in described["responses"]


@pytest.mark.parametrize(
    ("feature", "body", "status", "code"),
    [
        ("nonsense", form(image_url()), 404, "not_found"),
        ("lost", form(image_url()), 404, "task_not_found"),
        ("shout", form(text_url("a")), 500, "internal_error"),
        ("clip_image", "", 400, "invalid_input"),
        ("clip_image", "data=", 400, "invalid_input"),
        ("clip_image", "data=&" + form(image_url()), 400, "invalid_input"),
        ("clip_image", "image=" + image_url(), 400, "invalid_input"),
        ("clip_image", form("data:image/png;base64,nonsense"), 400, "invalid_input"),
        ("clip_image", b"data=data:image/png;base64,\xff", 400, "invalid_input"),
        ("clip_image", "data=data:image/png;base64,%FF", 400, "invalid_input"),
        ("clip_text", form("data:text/plain;charset=utf-8,no base64"), 400, "invalid_input"),
        ("clip_text", form("data:text/plain;charset=utf-8,/w=="), 400, "invalid_input"),
        ("slow", form(image_url(1)), 500, "model_error"),
    ],
    ids=[
        "unknown feature",
        "feature of an unknown task",
        "task without fields",
        "no body",
        "no data",
        "no data in the first field",
        "another field",
        "no picture",
        "no ASCII",
        "no ASCII, escaped",
        "no base64",
        "no UTF-8",
        "failing model",
    ],
)
def test_what_is_no_feature_is_refused(
    vitrivr: FlaskClient, feature: str, body: str | bytes, status: int, code: str
) -> None:
    response = extract(vitrivr, feature, body)

    assert (response.status_code, json_of(response)["code"]) == (status, code)


def test_overload_is_a_503_that_says_when_to_come_again(vitrivr_with: MakeClient, my_model: Any) -> None:
    vitrivr = vitrivr_with(MAX_QUEUE_SIZE="1", MAX_BATCH_SIZE="1")
    my_model.is_open.clear()
    with ThreadPoolExecutor(2) as pool:
        for kind in ("running_jobs", "queue_depth"):
            pool.submit(extract, vitrivr.application.test_client(), "clip_image", form(image_url()))
            wait_until(partial(has_one, vitrivr, kind))

        refused = extract(vitrivr, "clip_image", form(image_url()))
        my_model.is_open.set()

    assert (refused.status_code, json_of(refused)["code"]) == (503, "model_unavailable")
    assert int(refused.headers["Retry-After"]) > 0


def has_one(client: FlaskClient, kind: str) -> bool:
    return bool(json_of(client.get("/api/models/my_model/status"))[kind] == 1)


@pytest.mark.parametrize("value", ["clip", "=task", "clip=", "clip=task:", "a=b,c"])
def test_features_that_make_no_sense_are_told_before_the_server_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    environment = {"LOG_PATH": str(tmp_path / "log.txt"), "VITRIVR_FEATURES": value}

    with pytest.raises(SystemExit) as caught:
        build_engine(SettingsManager(environment, tmp_path / ".env"))

    assert caught.value.code == 2
    assert f"VITRIVR_FEATURES={value!r} is not allowed" in capsys.readouterr().err


def test_answers_are_what_json_readers_of_one_kind_take(vitrivr: FlaskClient) -> None:
    body = {"image": image_url()}
    id = json_of(vitrivr.post("/api/tasks/object-detection/fake-echo/jobs", json=body))["id"]

    text = vitrivr.get(f"/api/tasks/object-detection/jobs/{id}").text

    assert json.loads(text)["result"]["boxes"] == [[0, 0, 40, 30]]
    assert "40.0" not in text  # the client reads the corners as whole numbers
