"""A table of bad requests, with the answer that each deserves from a server with ``SETTINGS``."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from tests.conftest import encode_image
from tests.media_files import encode, png, recording

SETTINGS = {
    "MAX_ITEMS": "8",
    "MAX_IMAGE_PIXELS": "1000000",
    "MAX_DECODED_BYTES": "8000000",
    "MAX_AUDIO_SECONDS": "5",
    "MAX_CONTENT_LENGTH": "200000",
}
JSON = "application/json"

CAPTION = "/api/tasks/image_captioning/models/fake_echo/features"
CONDITIONAL = "/api/tasks/conditional_image_captioning/models/fake_echo/features"
CLASSIFY = "/api/tasks/zero_shot_image_classification/models/fake_echo/features"
DETECT = "/api/models/fake_echo/tasks/object_detection/features"
SPEECH = "/api/tasks/automated_speech_recognition/models/fake_echo/features"
SHOUT = "/api/tasks/fake_shout/models/fake_echo/features"

PNG = encode_image(Image.new("RGB", (40, 30), "red"))
NOISE = Image.effect_noise((64, 64), 50).convert("RGB")


@dataclass(frozen=True)
class BadRequest:
    """A request; the answer's status, code and field; and a word of its sentence that names what was wrong."""

    name: str
    path: str
    body: bytes
    status: int
    code: str
    word: str
    field: str | None = None
    method: str = "POST"
    content_type: str | None = JSON


def part(image: str, share: float) -> str:
    data = base64.b64decode(image)
    return encode(data[: int(len(data) * share)])


def invalid(name: str, path: str, payload: Any, word: str, field: str | None = None) -> BadRequest:
    """A body that is JSON, but not what the route takes."""
    return BadRequest(name, path, json.dumps(payload).encode(), 400, "invalid_input", word, field)


def raw(name: str, body: bytes, word: str) -> BadRequest:
    """A body that is no JSON object."""
    return BadRequest(name, CAPTION, body, 400, "invalid_input", word)


def too_large(name: str, path: str, payload: Any, word: str, field: str | None = None) -> BadRequest:
    return BadRequest(name, path, json.dumps(payload).encode(), 413, "too_large", word, field)


def unsupported(name: str, content_type: str | None, word: str) -> BadRequest:
    body = json.dumps({"image": PNG}).encode()
    return BadRequest(name, CAPTION, body, 415, "unsupported_media_type", word, content_type=content_type)


def unknown(name: str, path: str, code: str, word: str, method: str = "POST", payload: Any = None) -> BadRequest:
    return BadRequest(name, path, json.dumps(payload or {"image": PNG}).encode(), 404, code, word, method=method)


def wrong_method(method: str, path: str, allowed: str) -> BadRequest:
    return BadRequest(f"{method} {path}", path, b"{}", 405, "method_not_allowed", allowed, method=method)


def not_json() -> Iterable[BadRequest]:
    yield raw("an empty body", b"", "empty")
    yield raw("white space", b" \n ", "empty")
    yield raw("a byte order mark alone", b"\xef\xbb\xbf", "empty")
    yield raw("a text", b"hello", "not valid JSON")
    yield raw("a form", b"image=abc", "not valid JSON")
    yield raw("half an object", b'{"image": "', "not valid JSON")
    yield raw("two objects", b"{}{}", "not valid JSON")
    yield raw("a comma at the end", b'{"image": "a",}', "not valid JSON")
    yield raw("single quotes", b"{'image': 'a'}", "not valid JSON")
    yield raw("a raw control character", b'{"image": "a\nb"}', "not valid JSON")
    yield raw("bytes that are not UTF-8", b'{"image": "\xff\xfe"}', "byte 11 is not UTF-8")
    yield raw("UTF-8 of half a surrogate pair", b'{"image": "\xed\xa0\x80"}', "not UTF-8")
    yield raw("UTF-16", '{"image": "a"}'.encode("utf-16"), "not UTF-8")
    yield raw("gzip", b"\x1f\x8b\x08\x00\x00\x00", "not UTF-8")
    yield raw("NaN", b'{"image": NaN}', "NaN")
    yield raw("infinity", b'{"image": Infinity}', "Infinity")
    yield raw("negative infinity", b'{"config": {"a": -Infinity}}', "-Infinity")
    yield raw("1e999", b'{"image": 1e999}', "1e999")
    yield raw("an integer of 5000 digits", b'{"image": ' + b"9" * 5000 + b"}", "too large")
    yield raw("an integer of 400 digits", b'{"image": ' + b"9" * 400 + b"}", "too large")
    yield raw("a list", b"[]", "must be a JSON object")
    yield raw("a string", b'"image"', "must be a JSON object")
    yield raw("a number", b"1", "must be a JSON object")
    yield raw("a boolean", b"true", "must be a JSON object")
    yield raw("null", b"null", "must be a JSON object")
    yield raw("100000 brackets", b"[" * 100_000, "nested too deeply")
    yield raw("5000 nested objects", b'{"a":' * 5000 + b"1" + b"}" * 5000, "nested too deeply")
    yield raw("900 nested lists in config", b'{"config": {"a": ' + b"[" * 900 + b"]" * 900 + b"}}", "nested too deeply")


def content_types() -> Iterable[BadRequest]:
    yield unsupported("no content type", None, "none")
    yield unsupported("a form's type", "application/x-www-form-urlencoded", "x-www-form-urlencoded")
    yield unsupported("plain text", "text/plain", "text/plain")
    yield unsupported("a recording's type for a task of images", "audio/wav", "one file (image/*)")
    yield unsupported("a type that is none", "json", "json")


def forms_and_files() -> Iterable[BadRequest]:
    multipart = "multipart/form-data; boundary=x"

    def form(name: str, body: bytes, word: str, field: str | None = None, **more: Any) -> BadRequest:
        return BadRequest(name, CAPTION, body, 400, "invalid_input", word, field, content_type=multipart, **more)

    def part(data: bytes, name: str = "image", filename: str = '; filename="a"') -> bytes:
        return f'--x\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'.encode() + data + b"\r\n"

    png = part(base64.b64decode(PNG))
    yield form("a form that is JSON", b'{"image": "a"}', "not a valid multipart form")
    yield form("a form without its end", png, "the last boundary is missing")
    yield form("a form without parts", b"--x--\r\n", "missing", "image")
    yield form("a form with an empty file", part(b"") + b"--x--", "image is empty", "image")
    yield form("a form with a damaged second image", png + part(b"no") + b"--x--", "not an image", "image[1]")
    yield form("a form with an unknown field", png + part(b"no", "x") + b"--x--", "unknown key 'x'", "x")
    yield form("a form with a config that is no JSON", png + part(b"{", "config", "") + b"--x--", "JSON", "config")
    yield form("a form with a web address", part(b"http://a.org", filename="") + b"--x--", "ALLOWED_URL", "image")
    many = BadRequest("a form of too many images", CAPTION, png * 9 + b"--x--", 413, "too_large", "8 items", "image")
    large = BadRequest("a form of too many bytes", CAPTION, part(bytes(200_000)), 413, "too_large", "200000 bytes")
    yield replace(many, content_type=multipart)
    yield replace(large, content_type=multipart)
    text = BadRequest("a text sent as an image", CAPTION, b"hello", 400, "invalid_input", "not an image", "image")
    yield replace(text, content_type="image/png")
    yield replace(text, name="an image file without a byte", body=b"", word="empty", content_type="image/png")
    yield replace(
        text,
        name="an image file with an unknown query",
        path=f"{CAPTION}?x=1",
        content_type="image/png",
        word="unknown key",
        field="x",
    )


def keys() -> Iterable[BadRequest]:
    yield invalid("no image", CAPTION, {}, "missing", "image")
    yield invalid("an image that is null", CAPTION, {"image": None}, "missing", "image")
    yield invalid("config alone", CAPTION, {"config": {}}, "missing", "image")
    yield invalid("a misspelt key", CAPTION, {"imgae": PNG}, "imgae", "imgae")
    yield invalid("one key too many", CAPTION, {"image": PNG, "text": "a"}, "text", "text")
    yield invalid("an empty key", CAPTION, {"image": PNG, "": 1}, "unknown key ''", "")
    yield invalid("a key in capitals", CAPTION, {"Image": PNG}, "Image", "Image")
    yield invalid("a key of 5000 characters", CAPTION, {"x" * 5000: 1}, "xxx...", "x" * 40 + "...")
    yield invalid("half a surrogate pair as key", CAPTION, {"\ud800": 1}, "d800", "\\ud800")
    yield invalid("Python's own names as keys", CAPTION, {"self": 1, "__class__": 2}, "self", "self")
    yield invalid("no text", CONDITIONAL, {"image": PNG}, "missing", "text")
    yield invalid("no classes", CLASSIFY, {"image": PNG}, "missing", "classes")
    yield invalid("no audio", SPEECH, {}, "missing", "audio")
    yield invalid("an image for speech recognition", SPEECH, {"image": PNG}, "image", "image")
    yield invalid("a hand-written task without its key", SHOUT, {}, "text")
    yield invalid("a hand-written task with an unknown key", SHOUT, {"text": "a", "volume": 1}, "volume")
    yield invalid("a hand-written task's own check", SHOUT, {"text": 1}, "text must be a string")


def wrong_types() -> Iterable[BadRequest]:
    for kind, value in {"a number": 1, "a boolean": True, "an object": {}}.items():
        yield invalid(f"an image that is {kind}", CAPTION, {"image": value}, kind, "image")
        yield invalid(f"a text that is {kind}", CONDITIONAL, {"image": PNG, "text": value}, kind, "text")
        yield invalid(f"an audio that is {kind}", SPEECH, {"audio": value}, kind, "audio")
        yield invalid(f"{kind} in a list of images", CAPTION, {"image": [PNG, value]}, kind, "image[1]")
    yield invalid("null in a list of images", CAPTION, {"image": [None]}, "null", "image[0]")
    yield invalid("nested lists of images", CAPTION, {"image": [[PNG]]}, "a list", "image[0]")
    yield invalid("null in a list of texts", CONDITIONAL, {"image": PNG, "text": ["a", None]}, "null", "text[1]")
    for kind, value in {"a number": 1, "a boolean": True, "a string": "{}", "a list": []}.items():
        yield invalid(f"a config that is {kind}", CAPTION, {"image": PNG, "config": value}, kind, "config")
    for kind, value in {"a number": 1, "a string": "cat", "an object": {"cat": 1}}.items():
        yield invalid(f"classes that are {kind}", CLASSIFY, {"image": PNG, "classes": value}, kind, "classes")
    yield invalid("no class", CLASSIFY, {"image": PNG, "classes": []}, "empty", "classes")
    yield invalid("classes that are null", CLASSIFY, {"image": PNG, "classes": None}, "missing", "classes")
    yield invalid("a number in classes", CLASSIFY, {"image": PNG, "classes": ["a", 1]}, "a number", "classes[1]")
    yield invalid("null in classes", CLASSIFY, {"image": PNG, "classes": [None]}, "null", "classes[0]")
    yield invalid("a list in classes", CLASSIFY, {"image": PNG, "classes": [["a"]]}, "a list", "classes[0]")
    yield invalid("half a surrogate pair as image", CAPTION, {"image": "\ud800"}, "surrogate", "image")
    yield invalid("half a surrogate pair as text", CONDITIONAL, {"image": PNG, "text": "a\udc00"}, "surrogate", "text")
    yield invalid(
        "half a surrogate pair in classes", CLASSIFY, {"image": PNG, "classes": ["\ud83d"]}, "surrogate", "classes[0]"
    )
    yield invalid(
        "lists of two lengths", CONDITIONAL, {"image": [PNG, PNG], "text": ["a"]}, "image has 2, text has 1", "text"
    )
    yield invalid("an empty list beside a full one", CONDITIONAL, {"image": [], "text": ["a"]}, "image has 0", "text")


def images() -> Iterable[BadRequest]:
    def image(name: str, text: str, word: str) -> BadRequest:
        return invalid(name, CAPTION, {"image": text}, word, "image")

    yield image("an empty image", "", "empty")
    yield image("a data URL without data", "data:image/png;base64,", "empty")
    yield image("a data URL without base64", "data:image/png,abc", "data URL")
    yield image("a data URL without a comma", f"data:image/png;base64{PNG}", "data URL")
    yield image("a text that is not base64", "a red square!", "base64")
    yield image("base64 with a character too many", "AAAAA", "base64")
    yield image("base64 with padding inside", "AA==AA==", "base64")
    yield image("base64 beyond ASCII", "ÄÄÄÄ", "base64")
    yield image("a web address", "https://example.org/red.png", "ALLOWED_URL_HOSTS")
    yield image("a file's path", "/etc/passwd", "not an image")
    yield image("base64 of a text", encode(b"hello"), "not an image")
    yield image("base64 of base64", encode(PNG.encode()), "not an image")
    yield image("SVG", encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "not an image")
    yield image("a recording", encode(recording([0.0] * 100)), "not an image")
    yield image("EPS", encode_image(NOISE, "EPS"), "EPS")
    yield image("half a PNG", part(encode_image(NOISE), 0.5), "damaged")
    yield image("half a JPEG", part(encode_image(NOISE, "JPEG"), 0.5), "damaged")
    yield image("half a GIF", part(encode_image(NOISE, "GIF"), 0.5), "damaged")
    yield image("half a WebP", part(encode_image(NOISE, "WEBP", lossless=True), 0.5), "image is")
    yield image("half a TIFF", part(encode_image(NOISE, "TIFF"), 0.5), "image is")
    yield image("half a BMP", part(encode_image(NOISE, "BMP"), 0.5), "damaged")
    yield image("a PNG's header alone", encode(base64.b64decode(PNG)[:33]), "image is")
    yield image("a PNG without pixels", encode(png(0, 10, 8, 2, b"")), "image is")
    yield image("a PNG whose header is overwritten by zeros", encode(base64.b64decode(PNG)[:8] + bytes(99)), "image is")
    yield invalid("a damaged image among good ones", CAPTION, {"image": [PNG, "AAAA"]}, "not an image", "image[1]")
    yield invalid("a damaged image elsewhere", DETECT, {"image": "AAAA"}, "not an image", "image")
    yield too_large(
        "a PNG header of 60000 x 60000",
        CAPTION,
        {"image": encode(png(60_000, 60_000, 8, 2, bytes(999)))},
        "pixels",
        "image",
    )
    yield too_large(
        "a small file of many pixels",
        CAPTION,
        {"image": [encode_image(Image.new("L", (1001, 1000)))]},
        "1001 x 1000 = 1001000 pixels; at most 1000000 are allowed (MAX_IMAGE_PIXELS)",
        "image[0]",
    )
    yield too_large(
        "small files of too many pixels together",
        CAPTION,
        {"image": [encode_image(Image.new("L", (1000, 1000)))] * 3},
        "(MAX_DECODED_BYTES): send fewer of them at a time",
        "image[2]",
    )


def recordings() -> Iterable[BadRequest]:
    def audio(name: str, text: str, word: str) -> BadRequest:
        return invalid(name, SPEECH, {"audio": text}, word, "audio")

    yield audio("an empty recording", "", "empty")
    yield audio("a recording that is no base64", "la la la!", "base64")
    yield audio("a text as recording", encode(b"hello"), "not a recording")
    yield audio("an image as recording", PNG, "not a recording")
    yield audio("a WAV's header alone", encode(b"RIFF\0\0\0\0WAVE"), "not a recording")
    yield audio(
        "half a FLAC", part(encode(recording(np.random.default_rng(0).random(9000), "FLAC", "PCM_16")), 0.5), "FLAC"
    )
    yield audio("the begin of an OGG", part(encode(recording([0.0] * 9000, "OGG", "VORBIS")), 0.1), "not a recording")
    yield audio("a recording without samples", encode(recording([])), "without a single sample")
    yield audio("a recording of NaN", encode(recording([0.0, np.nan])), "not finite")
    yield audio("a recording of infinity", encode(recording([np.inf])), "not finite")
    yield too_large(
        "a recording that is too long",
        SPEECH,
        {"audio": [encode(recording([0.0] * 40_001, "FLAC", "PCM_16"))]},
        "longer than 5 seconds",
        "audio[0]",
    )


def too_much() -> Iterable[BadRequest]:
    yield too_large("too many images", CAPTION, {"image": [PNG] * 9}, "9 items; at most 8", "image")
    yield too_large("too many texts", CONDITIONAL, {"image": PNG, "text": ["a"] * 9}, "9 items", "text")
    yield too_large("too many classes", CLASSIFY, {"image": PNG, "classes": ["a"] * 9}, "9 items", "classes")
    yield too_large("too many bytes", CAPTION, {"image": "A" * 200_000}, "200000 bytes (MAX_CONTENT_LENGTH)")
    yield too_large("too many bytes for /extract", "/extract", {"image": "A" * 200_000}, "200000 bytes")
    yield too_large("too many bytes for /load", "/load", {"model": "A" * 200_000}, "200000 bytes")


def names() -> Iterable[BadRequest]:
    for route in ("features", "start", "stop"):
        middle = "tasks/image_captioning/" if route == "features" else ""
        path = f"/api/models/nobody/{middle}{route}"
        yield unknown(f"an unknown model's {route}", path, "model_not_found", "nobody")
    yield unknown("an unknown model's status", "/api/models/nobody/status", "model_not_found", "nobody", "GET")
    yield unknown("an unknown model's tasks", "/api/models/nobody/tasks/list", "model_not_found", "nobody", "GET")
    yield unknown("an unknown task's models", "/api/tasks/juggling/models/list", "task_not_found", "juggling", "GET")
    yield unknown("an unknown task", "/api/tasks/juggling/features", "task_not_found", "juggling")
    yield unknown(
        "an unknown task of a model", "/api/models/fake_echo/tasks/juggling/features", "task_not_found", "jug"
    )
    yield unknown(
        "a task that the model lacks",
        "/api/models/fake_slow/tasks/object_detection/features",
        "task_not_supported",
        "slow",
    )
    yield unknown(
        "an attribute that is no task", "/api/models/fake_echo/tasks/load_model/features", "task_not_found", "load"
    )
    yield unknown("a name in capitals", "/api/models/FAKE_ECHO/status", "model_not_found", "FAKE_ECHO", "GET")
    yield unknown("a name with an umlaut", "/api/models/%C3%BC/status", "model_not_found", "ü", "GET")
    yield unknown("a name that is not UTF-8", "/api/models/%ff%fe/status", "model_not_found", "no model", "GET")
    yield unknown("a name with a null byte", "/api/models/a%00b/status", "model_not_found", "\\x00", "GET")
    yield unknown("a name with a line break", "/api/models/a%0d%0ab/status", "model_not_found", "\\r\\n", "GET")
    yield unknown("a name with markup", "/api/models/%3Cb%3E/status", "model_not_found", "<b>", "GET")
    yield unknown("a name with a slash", "/api/models/a%2Fb/status", "not_found", "/api/models/a/b/status", "GET")
    yield unknown("a name of two dots", "/api/models/../status", "model_not_found", "'..'", "GET")
    yield unknown("a path out of the folder", "/api/models/..%2f..%2fetc/status", "not_found", "no route", "GET")
    yield unknown("a name of 4000 characters", f"/api/models/{'x' * 4000}/status", "model_not_found", "xxx", "GET")
    yield unknown("an empty name", "/api/models//status", "not_found", "no route", "GET")
    yield unknown("a double slash", "/api//tasks/list", "not_found", "no route", "GET")
    yield unknown("an unknown file", "/favicon.ico", "not_found", "no route /favicon.ico", "GET")
    yield unknown("an unknown route", "/api/nothing", "not_found", "/api/nothing", "GET")
    yield unknown("a file's route", "/static/../../etc/passwd", "not_found", "no route", "GET")
    yield BadRequest(
        "no model, no default", "/api/tasks/image_captioning/features", b"{}", 400, "no_default", "DEFAULT_MODEL_IMAGE"
    )


def legacy() -> Iterable[BadRequest]:
    for prefix in ("", "/legacy"):
        echo = {"task": "image_captioning", "model": "fake_echo"}
        yield invalid(f"{prefix}/extract without an image", f"{prefix}/extract", echo, "missing", "image")
        yield invalid(
            f"{prefix}/extract with an unknown key", f"{prefix}/extract", echo | {"image": PNG, "x": 1}, "'x'", "x"
        )
        yield invalid(
            f"{prefix}/extract with a task that is a number", f"{prefix}/extract", {"task": 1}, "task", "task"
        )
        yield invalid(
            f"{prefix}/extract with a model that is a list", f"{prefix}/extract", echo | {"model": []}, "model", "model"
        )
        yield BadRequest(f"{prefix}/extract of nothing", f"{prefix}/extract", b"{}", 400, "no_default", "DEFAULT_TASK")
        yield unknown(
            f"{prefix}/extract of an unknown task",
            f"{prefix}/extract",
            "task_not_found",
            "jug",
            payload={"task": "jug"},
        )
        yield unknown(
            f"{prefix}/extract of an unknown model",
            f"{prefix}/extract",
            "model_not_found",
            "he",
            payload={"model": "he"},
        )
        yield unknown(
            f"{prefix}/extract of a task that the model lacks",
            f"{prefix}/extract",
            "task_not_supported",
            "fake_slow",
            payload={"task": "object_detection", "model": "fake_slow"},
        )
        for route in (f"{prefix}/load", f"{prefix}/free"):
            yield invalid(f"{route} with an unknown key", route, {"model": "fake_echo", "image": PNG}, "image", "image")
            yield invalid(f"{route} of a model that is a number", route, {"model": 1}, "model", "model")
            yield BadRequest(f"{route} of nothing", route, b"{}", 400, "no_default", "name a task")
            yield BadRequest(f"{route} of a list", route, b"[]", 400, "invalid_input", "object")
            yield unknown(f"{route} of an unknown model", route, "model_not_found", "he", payload={"model": "he"})
    yield BadRequest(
        "/load of a model that cannot be had", "/load", b'{"task": "juggling"}', 404, "task_not_found", "juggling"
    )


def methods() -> Iterable[BadRequest]:
    lists = ["/api/tasks/list", "/api/models/list", "/api/models/fake_echo/tasks/list"]
    lists += ["/api/tasks/image_captioning/models/list", "/api/plugins", "/api/models/fake_echo/status"]
    for path in [*lists, "/tasks", "/legacy/tasks"]:
        yield wrong_method("POST", path, "GET")
    features = [CAPTION, DETECT, "/api/tasks/image_captioning/features"]
    actions = ["/api/models/fake_echo/start", "/api/models/fake_echo/stop"]
    old = [prefix + path for prefix in ("", "/legacy") for path in ("/extract", "/load", "/free")]
    for path in features + actions + old:
        yield wrong_method("GET", path, "POST")
    for method in ("PUT", "DELETE", "PATCH"):
        yield wrong_method(method, CAPTION, "POST")


BAD_REQUESTS = [
    *not_json(),
    *content_types(),
    *forms_and_files(),
    *keys(),
    *wrong_types(),
    *images(),
    *recordings(),
    *too_much(),
    *names(),
    *legacy(),
    *methods(),
]


def faults(request: BadRequest, status: int, content_type: str | None, body: bytes) -> list[str]:
    """Return what an answer lacks: its status, code and field, JSON, a sentence that names the fault and no more."""
    if content_type != JSON:
        return [f"content type {content_type}, status {status}: {body[:200]!r}"]
    answer = json.loads(body)
    if not isinstance(answer, dict):
        return [f"status {status}: {body[:200]!r}"]
    sentence = answer.get("error", "")
    found = {"status": status, "code": answer.get("code"), "field": answer.get("field")}
    expected = {"status": request.status, "code": request.code, "field": request.field}
    wrong = [f"{key} is {found[key]!r}, not {expected[key]!r}" for key in found if found[key] != expected[key]]
    if request.word not in sentence:
        wrong.append(f"{request.word!r} is not named")
    if set(answer) - {"error", "code", "field"}:
        wrong.append("there are other keys")
    internal = ["Traceback", "object at 0x", "site-packages", ".py", "BytesIO", "NoneType", "\n"]
    wrong += [f"{word!r} shows" for word in internal if word in sentence]
    return [f"{fault}: {answer}" for fault in wrong]
