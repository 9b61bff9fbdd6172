"""What an answer tells of itself where its client asks for it: where it comes from, and how long it took."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from feature_extraction_server.core.engine import Engine
from feature_extraction_server.flask.app import create_app
from tests.http.conftest import json_of
from tests.http.test_base_api import TALL, WIDE

Plugin = Callable[[str, str, str], None]

CAPTIONS = "/api/tasks/image_captioning/models/{}/features"
KNOWS = """
def load_model():
    global device
    device = "tpu:0"
def provenance():
    return {"checkpoint": "me/mine", "revision": 7, "dtype": "int8"}
def image_captioning(image, config):
    return [[f"{picture.width} wide"] for picture in image]
"""
HAS_CHECKPOINT = """
class checkpoint:
    def provenance():
        return {"checkpoint": "me/other", "revision": "abc", "dtype": "float16", "device": "cpu"}
def load_model(): pass
def image_captioning(image, config): return [["a"] for _ in image]
"""
CANNOT_TELL = """
def load_model(): pass
def provenance(): raise RuntimeError("no idea")
def image_captioning(image, config): return [["a"] for _ in image]
"""
OF_MINE = {"checkpoint": "me/mine", "revision": "7", "dtype": "int8", "device": "tpu:0"}
NOTHING = dict.fromkeys(OF_MINE)


@pytest.fixture
def mine(plugin: Plugin, build: Callable[..., Engine]) -> FlaskClient:
    plugin("models", "mine", KNOWS)
    return create_app(build()).test_client()


def ask(client: FlaskClient, query: str = "", prefer: str | None = None, image: Any = WIDE) -> TestResponse:
    headers = {} if prefer is None else {"Prefer": prefer}
    return client.post(CAPTIONS.format("mine") + query, json={"image": image}, headers=headers)


@pytest.mark.parametrize(
    ("query", "prefer"),
    [
        pytest.param("?meta=1", None, id="1"),
        pytest.param("?meta=True", None, id="true"),
        pytest.param("?meta=1", "return=minimal", id="the query against the header"),
        pytest.param("", "return=meta", id="header"),
        pytest.param("", 'respond-async, Return = "META"; a=b, return=minimal', id="header with other preferences"),
    ],
)
def test_answer_tells_where_it_comes_from_where_it_is_asked_to(
    mine: FlaskClient, query: str, prefer: str | None
) -> None:
    answer = json_of(ask(mine, query, prefer))

    assert answer["result"] == ["40 wide"]
    assert answer["meta"].items() >= (OF_MINE | {"model": "mine", "task": "image_captioning"}).items()
    assert list(answer["meta"])[-3:] == ["plugin_version", "queued_seconds", "computed_seconds"]
    assert answer["meta"]["plugin_version"] is None  # it is not installed
    assert answer["meta"]["queued_seconds"] > 0
    assert answer["meta"]["computed_seconds"] > 0


@pytest.mark.parametrize(
    ("query", "prefer"),
    [
        pytest.param("", None, id="not asked"),
        pytest.param("?meta=0", None, id="0"),
        pytest.param("?meta=false", None, id="false"),
        pytest.param("?meta=0", "return=meta", id="the query against the header"),
        pytest.param("?metadata=1", None, id="another parameter"),
        pytest.param("", "return=minimal, return=meta", id="a later preference"),
        pytest.param("", 'wait=10, ",;=', id="other preferences"),
    ],
)
def test_answer_is_bare_otherwise(mine: FlaskClient, query: str, prefer: str | None) -> None:
    response = ask(mine, query, prefer)

    assert json_of(response) == ["40 wide"]
    assert "Preference-Applied" not in response.headers


@pytest.mark.parametrize("query", ["?meta=2", "?meta=", "?meta=yes%0A%ff", "?meta=1&meta=1"])
def test_meta_that_is_neither_yes_nor_no_is_refused(mine: FlaskClient, query: str) -> None:
    response = ask(mine, query)

    assert response.status_code == 400
    assert (json_of(response)["code"], json_of(response)["field"]) == ("invalid_input", "meta")


def test_header_that_was_followed_is_confirmed(mine: FlaskClient) -> None:
    assert ask(mine, prefer="return=meta").headers["Preference-Applied"] == "return=meta"
    assert "Preference-Applied" not in ask(mine, "?meta=1").headers


def test_error_stays_as_it_is(mine: FlaskClient) -> None:
    response = ask(mine, "?meta=1", image="?")

    assert response.status_code == 400
    assert json_of(response).keys() == {"error", "code", "field"}


def test_batch_has_one_meta(mine: FlaskClient) -> None:
    answer = json_of(ask(mine, "?meta=1", image=[WIDE, TALL]))

    assert answer["result"] == [["40 wide"], ["20 wide"]]
    assert answer["meta"]["revision"] == "7"


def test_batch_of_nothing_comes_from_nowhere(mine: FlaskClient) -> None:
    answer = json_of(ask(mine, "?meta=1", image=[]))

    assert answer["result"] == []
    assert answer["meta"].items() >= (NOTHING | {"queued_seconds": 0, "computed_seconds": 0}).items()


@pytest.mark.parametrize("kind", ["one file", "form"])
def test_meta_in_the_query_is_no_key_of_the_input(mine: FlaskClient, kind: str) -> None:
    path = CAPTIONS.format("mine") + "?meta=1"
    picture = base64.b64decode(WIDE)

    response = (
        mine.post(path, data=picture, content_type="image/png")
        if kind == "one file"
        else mine.post(path, data={"image": (io.BytesIO(picture), "a.png")}, content_type="multipart/form-data")
    )

    assert json_of(response)["result"] == ["40 wide"]
    assert json_of(response)["meta"]["model"] == "mine"


def test_legacy_routes_take_it_for_a_key_of_the_input_as_ever(mine: FlaskClient) -> None:
    path = "/extract?task=image_captioning&model=mine&meta=1"

    response = mine.post(path, data=base64.b64decode(WIDE), content_type="image/png")

    assert response.status_code == 400
    assert json_of(response)["field"] == "meta"


def test_task_written_by_hand_has_its_meta(client: FlaskClient) -> None:
    answer = json_of(client.post("/api/tasks/fake_shout/models/fake_echo/features?meta=1", json={"text": "hi"}))

    assert answer["result"] == "HI!"
    assert answer["meta"].items() >= (NOTHING | {"task": "fake_shout", "model": "fake_echo"}).items()


@pytest.mark.parametrize(
    ("source", "told"),
    [
        pytest.param(
            HAS_CHECKPOINT,
            {"checkpoint": "me/other", "revision": "abc", "dtype": "float16", "device": "cpu"},
            id="its checkpoint tells",
        ),
        pytest.param(CANNOT_TELL, NOTHING, id="its function fails"),
    ],
)
def test_model_without_a_function_of_its_own_tells_what_is_known(
    plugin: Plugin, build: Callable[..., Engine], source: str, told: dict[str, str | None]
) -> None:
    plugin("models", "mine", source)
    client = create_app(build()).test_client()

    response = ask(client, "?meta=1")

    assert json_of(response)["meta"].items() >= told.items()


def test_model_tells_its_provenance_while_it_is_loaded(mine: FlaskClient) -> None:
    before = json_of(mine.get("/api/models/mine"))
    ask(mine)
    after = json_of(mine.get("/api/models/mine"))

    assert (before["provenance"], before["device"]) == (None, None)
    assert (after["provenance"], after["device"]) == (OF_MINE, "tpu:0")
