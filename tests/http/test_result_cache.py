"""Answers that are kept: what is answered from them, what is not, and what is told of it."""

from __future__ import annotations

import base64
import importlib
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
from flask.testing import FlaskClient
from PIL import Image
from werkzeug.test import TestResponse

from feature_extraction_server.core import media
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.url_fetch import UrlFetcher
from feature_extraction_server.flask.app import create_app
from tests.conftest import encode_image
from tests.http.conftest import json_of
from tests.http.test_monitoring import samples
from tests.waiting import wait_until

Plugin = Callable[[str, str, str], None]

#: Its state outlives its loads, as a checkpoint does that somebody replaces.
COUNTS = """
state = {"revision": "one", "calls": [], "fails": False}
def load_model(): pass
def provenance(): return {"checkpoint": "mine", "revision": state["revision"]}
def answers(image):
    state["calls"].append([picture.width for picture in image])
    if state["fails"]:
        raise RuntimeError("not today")
    return [[f"{picture.width} by {state['revision']}"] for picture in image]
def image_captioning(image, config): return answers(image)
def conditional_image_captioning(image, text, config): return answers(image)
def zero_shot_image_classification(image, classes, config):
    answers(image)
    return [[1 / len(classes)] * len(classes) for _ in image]
"""
CAPTIONS = "/api/tasks/image_captioning/models/mine/features"
PREFIXED = "/api/tasks/conditional_image_captioning/models/mine/features"
CLASSES = "/api/tasks/zero_shot_image_classification/models/mine/features"
MISS, HIT, BYPASS = "fes; fwd=miss", "fes; hit", "fes; fwd=bypass"


def wide(width: int) -> str:
    """Return a picture of a width."""
    return encode_image(Image.new("RGB", (width, 5), "red"))


@pytest.fixture
def state(plugin: Plugin) -> dict[str, Any]:
    """What the model ``mine`` says it has loaded, which may be changed, and the widths that it was called with."""
    plugin("models", "mine", COUNTS)
    found: dict[str, Any] = importlib.import_module("feature_extraction_server.models.mine").state
    return found


@pytest.fixture
def engine(state: dict[str, Any], build: Callable[..., Engine]) -> Engine:
    return build(RESULT_CACHE_BYTES="100000")


@pytest.fixture
def client(engine: Engine) -> FlaskClient:
    return create_app(engine).test_client()


def ask(client: FlaskClient, path: str = CAPTIONS, **payload: Any) -> TestResponse:
    response = client.post(path, json=payload)
    assert response.status_code == 200, response.text
    return response


def said(response: TestResponse) -> str | None:
    return response.headers.get("Cache-Status")


# What is answered from what is kept


def test_same_input_is_answered_without_the_model(client: FlaskClient, state: dict[str, Any]) -> None:
    first, second = ask(client, image=wide(3)), ask(client, image=wide(3))

    assert (said(first), said(second)) == (MISS, HIT)
    assert json_of(first) == json_of(second) == ["3 by one"]
    assert state["calls"] == [[3]]


def test_same_file_is_known_however_it_is_sent(client: FlaskClient, state: dict[str, Any]) -> None:
    text = wide(3)
    file = base64.b64decode(text)
    ask(client, image=text)

    others = [
        ask(client, image=f"data:image/png;base64,{text[:8]}\n{text[8:]}".rstrip("=")),
        client.post(CAPTIONS, data=file, content_type="image/png"),
        client.post(CAPTIONS, data={"image": (io.BytesIO(file), "a")}, content_type="multipart/form-data"),
        client.post("/extract", json={"task": "image_captioning", "model": "mine", "image": text}),
        ask(client, image=text, config=None),
        ask(client, image=text, config={}),
    ]

    assert {said(response) for response in others} == {HIT}
    assert state["calls"] == [[3]]


def test_picture_that_is_known_is_not_decoded(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(client, image=wide(3))
    monkeypatch.setattr(media, "decode_image", None)

    assert said(ask(client, image=wide(3))) == HIT


def test_only_what_is_missing_of_a_batch_is_computed(client: FlaskClient, state: dict[str, Any]) -> None:
    ask(client, image=[wide(3), wide(5)])

    response = ask(client, image=[wide(n) for n in (2, 3, 4, 5, 6)])

    assert json_of(response) == [[f"{n} by one"] for n in (2, 3, 4, 5, 6)]
    assert state["calls"] == [[3, 5], [2, 4, 6]]
    assert said(response) == 'fes; fwd=partial; detail="2 of 5 items hit"'


def test_single_value_that_stands_for_all_items_counts_for_each(client: FlaskClient, state: dict[str, Any]) -> None:
    ask(client, PREFIXED, image=wide(3), text="a")

    response = ask(client, PREFIXED, image=[wide(3), wide(4)], text="a")

    assert json_of(response) == [["3 by one"], ["4 by one"]]
    assert state["calls"] == [[3], [4]]


def test_empty_batch_is_answered(client: FlaskClient) -> None:
    assert json_of(ask(client, image=[])) == []


def test_file_of_a_url_is_known_by_its_bytes(engine: Engine, client: FlaskClient, state: dict[str, Any]) -> None:
    files = [wide(3), wide(4), wide(3)]

    class Changing:
        def fetch_all(self, urls: dict[str, str]) -> dict[str, bytes]:
            return {place: base64.b64decode(files.pop(0)) for place in urls}

    engine.limits = replace(engine.limits, urls=cast(UrlFetcher, Changing()))

    responses = [ask(client, image="https://example.org/a.png") for _ in range(3)]

    assert [json_of(response) for response in responses] == [["3 by one"], ["4 by one"], ["3 by one"]]
    assert [said(response) for response in responses] == [MISS, MISS, HIT]


def test_meta_of_a_known_answer_is_that_of_its_origin(client: FlaskClient) -> None:
    ask(client, image=wide(3))

    response = ask(client, CAPTIONS + "?meta=1", image=wide(3))

    assert said(response) == HIT
    assert json_of(response)["result"] == ["3 by one"]
    assert json_of(response)["meta"].items() >= {"revision": "one", "computed_seconds": 0}.items()


# What is not


@pytest.mark.parametrize(
    ("path", "first", "second"),
    [
        pytest.param(CAPTIONS, {"image": wide(3)}, {"image": wide(4)}, id="picture"),
        pytest.param(CAPTIONS, {"image": wide(3)}, {"image": wide(3), "config": {"a": 1}}, id="config"),
        pytest.param(
            CAPTIONS, {"image": wide(3), "config": {"a": 1}}, {"image": wide(3), "config": {"a": True}}, id="type"
        ),
        pytest.param(PREFIXED, {"image": wide(3), "text": "a"}, {"image": wide(3), "text": "b"}, id="text"),
        pytest.param(
            CLASSES, {"image": wide(3), "classes": ["a", "b"]}, {"image": wide(3), "classes": ["b", "a"]}, id="classes"
        ),
    ],
)
def test_other_input_is_computed(client: FlaskClient, path: str, first: Any, second: Any) -> None:
    assert [said(ask(client, path, **payload)) for payload in (first, second, second)] == [MISS, MISS, HIT]


def test_other_task_and_other_model_are_computed(client: FlaskClient) -> None:
    ask(client, image=wide(3))

    other_model = ask(client, CAPTIONS.replace("mine", "fake_echo"), image=wide(3))
    other_task = ask(client, PREFIXED, image=wide(3), text="")

    assert json_of(other_model) == ["3x5 (255, 0, 0)"]
    assert said(other_task) == MISS


def test_sampled_answer_is_computed_each_time(client: FlaskClient, state: dict[str, Any]) -> None:
    for _ in range(2):
        assert said(ask(client, image=wide(3), config={"do_sample": True})) == BYPASS

    assert state["calls"] == [[3], [3]]


def test_error_is_not_kept(client: FlaskClient, state: dict[str, Any]) -> None:
    state["fails"] = True
    failed = client.post(CAPTIONS, json={"image": wide(3)})
    state["fails"] = False

    response = ask(client, image=wide(3))

    assert failed.status_code == 500
    assert (said(response), json_of(response)) == (MISS, ["3 by one"])


def test_item_at_fault_is_named_by_its_place_in_the_whole_batch(client: FlaskClient) -> None:
    ask(client, image=[wide(3), wide(4)])

    not_base64 = client.post(CAPTIONS, json={"image": [wide(3), wide(4), "?"]})
    no_picture = client.post(CAPTIONS, json={"image": [wide(3), wide(4), "AAAA"]})

    assert [answer.status_code for answer in (not_base64, no_picture)] == [400, 400]
    assert [json_of(answer)["field"] for answer in (not_base64, no_picture)] == ["image[2]", "image[2]"]


def test_task_written_by_hand_is_left_alone(client: FlaskClient) -> None:
    response = ask(client, "/api/tasks/fake_shout/models/fake_echo/features", text="hi")

    assert said(response) is None


def test_nothing_is_kept_by_default(state: dict[str, Any], build: Callable[..., Engine]) -> None:
    client = create_app(build()).test_client()

    responses = [ask(client, image=wide(3)) for _ in range(2)]

    assert [said(response) for response in responses] == [None, None]
    assert state["calls"] == [[3], [3]]
    assert not [name for name, _ in samples(client) if "cache" in name]


# Models that start anew


def restart(engine: Engine) -> None:
    engine.stop("mine", wait=True)
    engine.start("mine", wait=True)


def test_answers_outlive_a_restart_with_the_same_weights(engine: Engine, client: FlaskClient) -> None:
    ask(client, image=wide(3))

    restart(engine)

    assert said(ask(client, image=wide(3))) == HIT


@pytest.mark.parametrize("revision", ["two", "local", None], ids=["another", "a folder", "one that is not known"])
def test_answers_of_other_weights_are_not_given(
    engine: Engine, client: FlaskClient, state: dict[str, Any], revision: str | None
) -> None:
    state["revision"] = "one" if revision == "two" else revision
    ask(client, image=wide(3))

    state["revision"] = revision
    restart(engine)

    response = ask(client, image=wide(3))
    assert (said(response), json_of(response)) == (MISS, [f"3 by {revision}"])


def test_model_that_is_stopped_is_started_before_its_answers_are_given(engine: Engine, client: FlaskClient) -> None:
    ask(client, image=wide(3))
    engine.stop("mine", wait=True)

    response = ask(client, image=wide(3))

    assert said(response) == MISS
    assert engine.status("mine")["state"] == "running"


def test_answers_of_two_revisions_are_not_mixed_in_one_batch(
    engine: Engine, client: FlaskClient, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(client, image=wide(3))
    recall = engine.recall

    def recall_just_before_a_restart(model: str, keys: Sequence[bytes], *rest: Any) -> list[bytes | None]:
        found = recall(model, keys, *rest)
        state["revision"] = "two"
        restart(engine)
        return found

    monkeypatch.setattr(engine, "recall", recall_just_before_a_restart)

    response = ask(client, image=[wide(3), wide(4)])

    assert json_of(response) == [["3 by two"], ["4 by two"]]
    assert said(response) == MISS


def test_model_whose_answers_are_in_use_does_not_count_as_idle(engine: Engine, client: FlaskClient) -> None:
    ask(client, image=wide(3))
    model = engine.models["mine"]
    wait_until(lambda: model.idle_since is not None, "the end of the call")
    before = model.idle_since or 0

    ask(client, image=wide(3))

    assert (model.idle_since or 0) > before


# How much


def test_answers_are_kept_as_long_as_there_is_room(state: dict[str, Any], build: Callable[..., Engine]) -> None:
    client = create_app(build(RESULT_CACHE_BYTES="1000")).test_client()

    for width in range(1, 21):
        ask(client, image=wide(width))

    assert said(ask(client, image=wide(20))) == HIT
    assert said(ask(client, image=wide(1))) == MISS
    assert samples(client)["fes_result_cache_bytes", (("model", "mine"),)] <= 1000


def test_metrics_tell_what_was_looked_up_and_what_is_kept(client: FlaskClient) -> None:
    ask(client, image=[wide(3), wide(4)])
    ask(client, image=[wide(3), wide(4), wide(5)])

    found = samples(client)

    names = ("hits_total", "misses_total", "entries")
    assert [found[f"fes_result_cache_{name}", (("model", "mine"),)] for name in names] == [2, 3, 3]
    assert found["fes_result_cache_bytes", (("model", "mine"),)] > 3 * len('["3 by one"]')
    assert found["fes_model_items_total", (("model", "mine"),)] == 3
