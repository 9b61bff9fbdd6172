"""Bodies that are not JSON: multipart forms and single files, for every route that runs a task."""

from __future__ import annotations

import base64
import gzip
import io
import json
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from PIL import Image
from werkzeug.test import TestResponse

from feature_extraction_server.core import media
from feature_extraction_server.flask import request_body
from tests.conftest import encode_image
from tests.http.bad_requests import CAPTION, CLASSIFY, CONDITIONAL, PNG, SHOUT, SPEECH
from tests.http.conftest import MakeClient, json_of
from tests.media_files import encode, recording

ROUTES = [
    "/api/models/fake_echo/tasks/image_captioning/features",
    "/api/tasks/image_captioning/models/fake_echo/features",
    "/api/tasks/image_captioning/features",
]
DEFAULTS = {"DEFAULT_TASK": "image_captioning", "DEFAULT_MODEL_IMAGE_CAPTIONING": "fake_echo"}
WIDE = base64.b64decode(PNG)
TALL = base64.b64decode(encode_image(Image.new("RGB", (20, 60), "blue")))
SOUND = recording([0.0] * 80)
BOUNDARY = "-----a-boundary"

SEES_INPUT = """
from feature_extraction_server.core.task import ConfigField, StringListField, TaskSpec, TextField
wrap = TaskSpec(
    description="Tell what came in.",
    inputs={"text": TextField("A text"), "words": StringListField("Words", required=False), "config": ConfigField()},
    output=str,
).wrap
"""
TELLS_INPUT = """
def load_model(): pass
def sees_input(text, config, words=None): return [repr((t, words, config)) for t in text]
"""


def post(client: FlaskClient, path: str, form: dict[str, Any]) -> TestResponse:
    """Post a form: bytes as a file, a list as parts of one name."""

    def encoded(value: Any) -> Any:
        if isinstance(value, list):
            return [encoded(element) for element in value]
        return (io.BytesIO(value), "a.bin") if isinstance(value, bytes) else value

    data = {name: encoded(value) for name, value in form.items()}
    return client.post(path, data=data, content_type="multipart/form-data")


def part(content: bytes, disposition: str, *headers: str) -> bytes:
    lines = [f"--{BOUNDARY}", f"Content-Disposition: form-data; {disposition}", *headers, "", ""]
    return "\r\n".join(lines).encode() + content + b"\r\n"


def post_parts(client: FlaskClient, path: str, *parts: bytes) -> TestResponse:
    body = b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()
    return client.post(path, data=body, content_type=f"multipart/form-data; boundary={BOUNDARY}")


def shown(response: TestResponse) -> tuple[int, str, str | None]:
    body = json_of(response)
    return response.status_code, body["code"], body.get("field")


@pytest.fixture
def seen(plugin: Callable[[str, str, str], None], client_with: MakeClient) -> Callable[..., Any]:
    """``seen(part, ...)`` gives what a task of a text, words and config received: once a text."""
    plugin("tasks", "sees_input", SEES_INPUT)
    plugin("models", "tells_input", TELLS_INPUT)
    client = client_with()

    def ask(*parts: bytes) -> Any:
        return json_of(post_parts(client, "/api/tasks/sees_input/features", *parts))

    return ask


# Multipart forms


@pytest.mark.parametrize("path", ROUTES)
def test_file_of_a_form_is_an_image(client_with: MakeClient, path: str) -> None:
    response = post(client_with(**DEFAULTS), path, {"image": WIDE})

    assert json_of(response) == ["40x30 (255, 0, 0)"]


def test_file_of_a_form_is_a_recording(client: FlaskClient) -> None:
    assert json_of(post(client, SPEECH, {"audio": SOUND})) == "80 samples at 8000 Hz"


def test_repeated_file_makes_a_batch(client: FlaskClient) -> None:
    response = post(client, CAPTION, {"image": [WIDE, TALL]})

    assert json_of(response) == [["40x30 (255, 0, 0)"], ["20x60 (0, 0, 255)"]]


def test_field_with_brackets_makes_a_batch_of_one(client: FlaskClient) -> None:
    assert json_of(post(client, CAPTION, {"image[]": WIDE})) == [["40x30 (255, 0, 0)"]]


def test_repeated_text_makes_a_batch_for_one_image(client: FlaskClient) -> None:
    response = post(client, CONDITIONAL, {"image": WIDE, "text": ["one", "two"]})

    assert json_of(response) == [["40x30"], ["40x30"]]


@pytest.mark.parametrize(
    "text", [pytest.param(PNG, id="base64"), pytest.param(f"data:image/png;base64,{PNG}", id="data URL")]
)
def test_text_where_a_file_belongs_is_its_base64(client: FlaskClient, text: str) -> None:
    assert json_of(post(client, CAPTION, {"image": text})) == ["40x30 (255, 0, 0)"]


@pytest.mark.parametrize(
    "classes",
    [
        pytest.param({"classes": ["cat", "dog"]}, id="repeated"),
        pytest.param({"classes": '["cat", "dog"]'}, id="JSON"),
        pytest.param({"classes[]": ["cat", "dog"]}, id="with brackets"),
        pytest.param({"classes": b'["cat", "dog"]'}, id="file"),
    ],
)
def test_list_of_strings_is_a_repeated_text_or_json(client: FlaskClient, classes: dict[str, Any]) -> None:
    assert json_of(post(client, CLASSIFY, {"image": WIDE} | classes)) == [0.5, 0.5]


def test_one_string_makes_a_list_of_strings(client: FlaskClient) -> None:
    assert json_of(post(client, CLASSIFY, {"image": WIDE, "classes": "cat"})) == [1.0]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        pytest.param([part("süß".encode(), 'name="text"')], [("süß", None, {})], id="a text"),
        pytest.param([part(b"[1]", 'name="text"')], [("[1]", None, {})], id="a text that looks like JSON"),
        pytest.param([part(b"\xef\xbb\xbfa", 'name="text"; filename="a.txt"')], [("a", None, {})], id="a text file"),
        pytest.param([part(b"", 'name="text"')], [("", None, {})], id="an empty text"),
        pytest.param(
            [part(b'["a", "b"]', 'name="text"', "Content-Type: application/json")],
            [("a", None, {}), ("b", None, {})],
            id="texts in JSON",
        ),
        pytest.param(
            [part(b"a", 'name="text"'), part(b'{"n": [1]}', 'name="config"')], [("a", None, {"n": [1]})], id="config"
        ),
        pytest.param(
            [part(b"a", 'name="text"'), part(b'{"n": 1}', 'name="config"; filename="config.json"')],
            [("a", None, {"n": 1})],
            id="config from a file",
        ),
        pytest.param(
            [part(b"a", 'name="text"'), part(b'{"n": 1}', 'name="config"', "Content-Type: application/json")],
            [("a", None, {"n": 1})],
            id="config declared as JSON",
        ),
        pytest.param([part(b"a", 'name="text"'), part(b"null", 'name="config"')], [("a", None, {})], id="config null"),
        pytest.param(
            [part(b"x", 'name="words"'), part(b"a", 'name="text"'), part(b"y", 'name="words"')],
            [("a", ["x", "y"], {})],
            id="parts in any order",
        ),
    ],
)
def test_part_is_read_as_its_field_wants_it(seen: Callable[..., Any], parts: list[bytes], expected: list[Any]) -> None:
    found = seen(*parts)

    assert found == [repr(item) for item in expected] or [found] == [repr(item) for item in expected]


def test_file_reaches_the_decoder_without_base64(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> bytes:
        raise AssertionError("base64 was decoded")

    monkeypatch.setattr(media, "decode_base64", refuse)

    assert post(client, CAPTION, {"image": WIDE}).status_code == 200
    assert client.post(CAPTION, data=WIDE, content_type="image/png").status_code == 200


def test_large_file_is_not_written_to_the_disk(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    large = base64.b64decode(encode_image(Image.effect_noise((1200, 1200), 90), "BMP"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))

    response = post_parts(client, CAPTION, part(large, 'name="image"; filename="large.bmp"'))

    assert json_of(response)[0].startswith("1200x1200")


def test_form_may_have_more_text_and_more_parts_than_flask_allows(client_with: MakeClient) -> None:
    classes = [part(b"x" * 400, 'name="classes"')] * 2000

    response = post_parts(
        client_with(MAX_ITEMS="3000"), CLASSIFY, part(WIDE, 'name="image"; filename="a.png"'), *classes
    )

    assert len(json_of(response)) == 2000


def test_hand_written_task_receives_texts_files_and_lists(
    plugin: Callable[[str, str, str], None], client_with: MakeClient
) -> None:
    plugin("tasks", "by_hand", "def wrap(func):\n    def run(a, b, c, d): return repr((a, b, c, d))\n    return run\n")
    plugin("models", "hand", "def load_model(): pass\ndef by_hand(): pass\n")

    response = post_parts(
        client_with(),
        "/api/tasks/by_hand/features",
        part(b"text", 'name="a"'),
        part(b"\xff", 'name="b"; filename="b.bin"'),
        part(b"1", 'name="c"'),
        part(b"2", 'name="c"'),
        part(b'{"n": 1}', 'name="d"', "Content-Type: application/json"),
    )

    assert json_of(response) == repr(("text", b"\xff", ["1", "2"], {"n": 1}))


@pytest.mark.parametrize(
    ("path", "form", "field", "word"),
    [
        pytest.param(CAPTION, {}, "image", "missing", id="an empty form"),
        pytest.param(CAPTION, {"image": [WIDE, b"no"]}, "image[1]", "not an image", id="a damaged image"),
        pytest.param(CAPTION, {"image": b""}, "image", "image is empty", id="an empty file"),
        pytest.param(SPEECH, {"audio": b""}, "audio", "audio is empty", id="an empty recording"),
        pytest.param(CAPTION, {"image": WIDE, "x": "1"}, "x", "unknown key 'x'", id="an unknown field"),
        pytest.param(CAPTION, {"image": WIDE, "x" * 99: "1"}, "x" * 40 + "...", "unknown", id="a long name"),
        pytest.param(CAPTION, {"image": WIDE, "config": "{"}, "config", "not valid JSON", id="config, no JSON"),
        pytest.param(CAPTION, {"image": WIDE, "config": ""}, "config", "config is empty", id="empty config"),
        pytest.param(CAPTION, {"image": WIDE, "config": "[]"}, "config", "an object", id="config, a list"),
        pytest.param(CAPTION, {"image": WIDE, "config": '{"a": NaN}'}, "config", "NaN", id="config with NaN"),
        pytest.param(CAPTION, {"image": WIDE, "config": "[" * 9999}, "config", "nested", id="config, nested"),
        pytest.param(CAPTION, {"image": WIDE, "config": ["{}"] * 2}, "config", "2 times", id="config twice"),
        pytest.param(CLASSIFY, {"image": WIDE, "classes": "[1]"}, "classes[0]", "a number", id="classes of 1"),
        pytest.param(CLASSIFY, {"image": WIDE, "classes": "[]"}, "classes", "empty", id="no classes"),
        pytest.param(CONDITIONAL, {"image": WIDE, "text": b"\xff"}, "text", "UTF-8", id="no text file"),
        pytest.param(CONDITIONAL, {"image": [WIDE] * 3, "text": ["a", "b"]}, "text", "equally long", id="two lengths"),
        pytest.param(SHOUT, {"text": b"a"}, None, "text must be a string", id="a file by hand"),
    ],
)
def test_fault_of_a_form_is_told_with_its_field(
    client: FlaskClient, path: str, form: dict[str, Any], field: str | None, word: str
) -> None:
    response = post(client, path, form)

    assert shown(response) == (400, "invalid_input", field)
    assert word in json_of(response)["error"]


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        pytest.param(b"hello", f"multipart/form-data; boundary={BOUNDARY}", id="no boundary in the body"),
        pytest.param(part(WIDE, 'name="image"'), f"multipart/form-data; boundary={BOUNDARY}", id="no end"),
        pytest.param(part(WIDE, 'name="image"'), "multipart/form-data", id="no boundary in the header"),
        pytest.param(part(WIDE, 'name="image"'), "multipart/form-data; boundary=ü", id="a boundary beyond ASCII"),
        pytest.param(
            part(WIDE, 'filename="a"') + f"--{BOUNDARY}--".encode(),
            f"multipart/form-data; boundary={BOUNDARY}",
            id="a part without a name",
        ),
        pytest.param(
            f"--{BOUNDARY}\r\n\r\na\r\n--{BOUNDARY}--".encode(),
            f"multipart/form-data; boundary={BOUNDARY}",
            id="a part without headers",
        ),
        pytest.param(
            part(WIDE, 'name="image"; filename="a"').replace(b"\r\n", b"\r\n" + b"a: b\r\n" * 50_000, 1)
            + f"--{BOUNDARY}--".encode(),
            f"multipart/form-data; boundary={BOUNDARY}",
            id="a part with more headers than data",
        ),
        pytest.param(
            b"-" * 300_000 + b"\r\n" + part(WIDE, 'name="image"; filename="a"') + f"--{BOUNDARY}--".encode(),
            f"multipart/form-data; boundary={BOUNDARY}",
            id="much before the first part",
        ),
    ],
)
def test_malformed_form_is_refused(client: FlaskClient, body: bytes, content_type: str) -> None:
    response = client.post(CAPTION, data=body, content_type=content_type)

    assert shown(response) == (400, "invalid_input", None)
    assert "not a valid multipart form" in json_of(response)["error"]


@pytest.mark.parametrize(
    ("settings", "form", "field", "word"),
    [
        pytest.param(
            {"MAX_ITEMS": "2"}, {"image": [WIDE] * 3}, "image", "image holds more than 2 items", id="too many items"
        ),
        pytest.param(
            {"MAX_ITEMS": "2"}, {"classes": [b"a"] * 3}, "classes", "more than 2 items", id="too many strings"
        ),
        pytest.param({"MAX_IMAGE_PIXELS": "999"}, {"image": [WIDE]}, "image", "1200 pixels", id="too many pixels"),
        pytest.param({"MAX_CONTENT_LENGTH": "50"}, {"image": [WIDE]}, None, "50 bytes", id="too many bytes"),
    ],
)
def test_limits_hold_for_forms(
    client_with: MakeClient, settings: dict[str, str], form: dict[str, list[bytes]], field: str | None, word: str
) -> None:
    response = post(client_with(**settings), CAPTION, form)

    assert shown(response) == (413, "too_large", field)
    assert word in json_of(response)["error"]


def test_form_of_very_many_fields_is_refused(client: FlaskClient) -> None:
    response = post(client, CAPTION, {f"field{index}": "a" for index in range(101)})

    assert shown(response) == (400, "invalid_input", None)
    assert "more than 100 different fields" in json_of(response)["error"]


# A file as the body


@pytest.mark.parametrize("path", ROUTES)
def test_body_may_be_the_image_itself(client_with: MakeClient, path: str) -> None:
    response = client_with(**DEFAULTS).post(path, data=WIDE, content_type="image/png")

    assert json_of(response) == ["40x30 (255, 0, 0)"]


def test_body_may_be_the_recording_itself(client: FlaskClient) -> None:
    response = client.post(SPEECH, data=SOUND, content_type="audio/wav; rate=8000")

    assert json_of(response) == "80 samples at 8000 Hz"


@pytest.mark.parametrize(
    ("path", "query", "expected"),
    [
        pytest.param(CONDITIONAL, {"text": "süß"}, ["40x30"], id="a text"),
        pytest.param(CONDITIONAL, {"text": ["a", "b"]}, [["40x30"], ["40x30"]], id="two texts"),
        pytest.param(CLASSIFY, {"classes": ["a", "b"]}, [0.5, 0.5], id="classes, repeated"),
        pytest.param(CLASSIFY, {"classes": '["a", "b"]'}, [0.5, 0.5], id="classes, JSON"),
        pytest.param(CAPTION, {"config": '{"a": 1}'}, ["40x30 (255, 0, 0)"], id="config"),
    ],
)
def test_other_fields_of_a_single_file_come_from_the_query(
    client: FlaskClient, path: str, query: dict[str, Any], expected: Any
) -> None:
    response = client.post(path, data=WIDE, content_type="image/png", query_string=query)

    assert json_of(response) == expected


@pytest.mark.parametrize(
    ("query", "field", "word"),
    [
        pytest.param({}, "text", "missing", id="a field is missing"),
        pytest.param({"text": "a", "config": "{"}, "config", "not valid JSON", id="config, no JSON"),
        pytest.param({"text": "a", "image": PNG}, "image", "given twice", id="the file twice"),
        pytest.param({"text": "a", "x": "1"}, "x", "unknown key", id="an unknown field"),
    ],
)
def test_fault_of_the_query_is_told_with_its_field(
    client: FlaskClient, query: dict[str, str], field: str, word: str
) -> None:
    response = client.post(CONDITIONAL, data=WIDE, content_type="image/png", query_string=query)

    assert shown(response) == (400, "invalid_input", field)
    assert word in json_of(response)["error"]


@pytest.mark.parametrize(
    ("path", "content_type", "sentence"),
    [
        pytest.param(
            CAPTION,
            "text/plain",
            "the body for the task image_captioning must be JSON (application/json), a form (multipart/form-data) or "
            "one file (image/*), and the header Content-Type must say which (it was sent with: text/plain)",
            id="a text",
        ),
        pytest.param(CAPTION, "audio/wav", "or one file (image/*)", id="a recording for a task of images"),
        pytest.param(SPEECH, "image/png", "or one file (audio/*)", id="an image for a task of recordings"),
        pytest.param(CAPTION, "image", "(it was sent with: image)", id="half a type"),
        pytest.param(CAPTION, "application/x-www-form-urlencoded", "multipart/form-data", id="what curl sends unasked"),
        pytest.param(SHOUT, "image/png", "(application/json) or a form (multipart/form-data), and", id="by hand"),
    ],
)
def test_body_of_another_type_is_told_what_the_task_takes(
    client: FlaskClient, path: str, content_type: str, sentence: str
) -> None:
    response = client.post(path, data=WIDE, content_type=content_type)

    assert shown(response) == (415, "unsupported_media_type", None)
    assert sentence in json_of(response)["error"]


def test_single_file_is_refused_where_the_task_takes_two_of_its_kind(
    plugin: Callable[[str, str, str], None], client_with: MakeClient
) -> None:
    task = "from feature_extraction_server.core.task import AudioField, ImageField, TaskSpec\n"
    inputs = '{"a": ImageField("One"), "b": ImageField("Two"), "c": AudioField("Three", required=False)}'
    plugin("tasks", "two", task + f'wrap = TaskSpec(description="", inputs={inputs}, output=str).wrap\n')
    plugin("models", "pair", "def load_model(): pass\ndef two(a, b): return ['done']\n")
    client = client_with()

    alone = client.post("/api/tasks/two/features", data=WIDE, content_type="image/png")
    both = post(client, "/api/tasks/two/features", {"a": WIDE, "b": WIDE})

    assert shown(alone) == (415, "unsupported_media_type", None)
    assert "or one file (audio/*)" in json_of(alone)["error"]
    assert json_of(both) == "done"


def test_empty_body_is_an_empty_image(client: FlaskClient) -> None:
    response = client.post(CAPTION, data=b"", content_type="image/png")

    assert shown(response) == (400, "invalid_input", "image")


@pytest.mark.parametrize("content_type", ["image/png", f"multipart/form-data; boundary={BOUNDARY}"])
def test_unknown_model_is_told_before_the_body_is_read(client: FlaskClient, content_type: str) -> None:
    response = client.post("/api/tasks/image_captioning/models/nobody/features", data=b"x", content_type=content_type)

    assert shown(response) == (404, "model_not_found", None)


@pytest.mark.parametrize("length", [pytest.param("10", id="declared"), pytest.param("", id="undeclared")])
def test_too_large_a_file_is_refused(client_with: MakeClient, length: str) -> None:
    chunked = {"CONTENT_LENGTH": "", "HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}

    response = client_with(MAX_CONTENT_LENGTH="50").post(
        CAPTION, data=WIDE, content_type="image/png", environ_overrides={} if length else chunked
    )

    assert shown(response) == (413, "too_large", None)


# The legacy API


@pytest.mark.parametrize("prefix", ["", "/legacy"])
@pytest.mark.parametrize(
    "names",
    [
        pytest.param({"task": "image_captioning", "model": "fake_echo"}, id="both named"),
        pytest.param({"model": "fake_echo"}, id="model named"),
        pytest.param({}, id="none named"),
    ],
)
def test_extract_takes_forms_and_files(client_with: MakeClient, prefix: str, names: dict[str, str]) -> None:
    client = client_with(**DEFAULTS)

    form = post(client, f"{prefix}/extract", names | {"image": WIDE, "config": "{}"})
    single = client.post(f"{prefix}/extract", data=WIDE, content_type="image/png", query_string=names)

    assert json_of(form) == json_of(single) == ["40x30 (255, 0, 0)"]


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        pytest.param({"task": "juggling"}, (404, "task_not_found", None), id="an unknown task"),
        pytest.param({"task": ["a", "b"]}, (400, "invalid_input", "task"), id="two tasks"),
        pytest.param({"task": b"\xff"}, (400, "invalid_input", "task"), id="a file as task"),
        pytest.param({"image": WIDE}, (400, "no_default", None), id="no task"),
        pytest.param(
            {"task": "image_captioning", "model": "fake_echo"}, (400, "invalid_input", "image"), id="no image"
        ),
    ],
)
def test_fault_of_an_extract_form_is_told(
    client: FlaskClient, form: dict[str, Any], expected: tuple[int, str, str | None]
) -> None:
    assert shown(post(client, "/extract", form)) == expected


@pytest.mark.parametrize("content_type", ["text/plain", "audio/wav"])
def test_extract_refuses_other_types(client_with: MakeClient, content_type: str) -> None:
    response = client_with(**DEFAULTS).post("/extract", data=WIDE, content_type=content_type)

    assert shown(response) == (415, "unsupported_media_type", None)


def test_json_is_read_as_ever(client: FlaskClient) -> None:
    body = json.dumps({"audio": encode(SOUND)})

    assert json_of(client.post(SPEECH, data=body, content_type="application/json")) == "80 samples at 8000 Hz"


@pytest.mark.parametrize(("n_lists", "status"), [(99, 400), (100, 413)])
def test_json_of_very_many_values_is_refused_before_it_is_parsed(
    client: FlaskClient, n_lists: int, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_body, "MAX_JSON_VALUES", 200)
    body = json.dumps({"image": [[]] * n_lists})  # and a comma between two, and two brackets around them

    response = client.post(CAPTION, data=body, content_type="application/json")

    assert response.status_code == status
    assert ("commas and opening brackets" in json_of(response)["error"]) == (status == 413)


def test_base64_of_any_length_is_no_json_of_many_values(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "MAX_JSON_VALUES", 20)
    body = json.dumps({"audio": encode(SOUND)})

    assert len(body) > 20
    assert client.post(SPEECH, data=body, content_type="application/json").status_code == 200


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "GZip": gzip.compress,
    "deflate": zlib.compress,
}


@pytest.mark.parametrize("coding", COMPRESS)
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        pytest.param(json.dumps({"image": PNG}).encode(), "application/json", id="json"),
        pytest.param(WIDE, "image/png", id="file"),
    ],
)
def test_body_may_be_compressed(
    client: FlaskClient, body: bytes, content_type: str, chunked: bool, coding: str
) -> None:
    compressed = COMPRESS[coding](body)
    how: dict[str, Any] = {"data": compressed}
    if chunked:
        how = {"input_stream": io.BytesIO(compressed), "environ_overrides": {"wsgi.input_terminated": True}}

    response = client.post(CAPTION, content_type=content_type, headers={"Content-Encoding": coding}, **how)

    assert json_of(response) == json_of(client.post(CAPTION, data=body, content_type=content_type))


@pytest.mark.parametrize(
    ("coding", "body", "status", "told"),
    [
        pytest.param("br", b"{}", 415, "takes gzip, deflate or none", id="unknown"),
        pytest.param("gzip, gzip", gzip.compress(gzip.compress(b"{}")), 415, "gzip, gzip", id="twice"),
        pytest.param("gzip", b"{}", 400, "not valid gzip", id="not compressed"),
        pytest.param("deflate", gzip.compress(b"{}"), 400, "not valid deflate", id="compressed otherwise"),
        pytest.param("gzip", gzip.compress(b"{}")[:-1], 400, "ended before", id="cut off"),
        pytest.param("gzip", b"", 400, "ended before", id="empty"),
        pytest.param("gzip", gzip.compress(b"{}") * 2, 400, "goes on", id="something behind it"),
        pytest.param("gzip", gzip.compress(bytes(100_000_000)), 413, "200000 bytes", id="too large decompressed"),
    ],
)
def test_fault_of_a_compressed_body_is_told(
    client_with: MakeClient, coding: str, body: bytes, status: int, told: str
) -> None:
    client = client_with(MAX_CONTENT_LENGTH="200000")

    response = client.post(CAPTION, data=body, content_type="application/json", headers={"Content-Encoding": coding})

    assert response.status_code == status
    assert told in json_of(response)["error"]
