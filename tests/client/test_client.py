"""The Python client, against the real app and against servers that misbehave."""

from __future__ import annotations

import base64
import io
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from feature_extraction_server.client import (
    Client,
    ConnectionFailed,
    FesError,
    Outcome,
    ServerError,
    TimedOut,
    Unreachable,
)
from feature_extraction_server.core.engine import Engine
from tests.client.conftest import Answer, Request, ScriptedServer
from tests.conftest import Server, encode_image, free_port
from tests.media_files import recording
from tests.waiting import TIMEOUT_S

Scripted = Callable[..., ScriptedServer]

RED = "40x30 (255, 0, 0)"
OK: Answer = (200, {}, '["fine"]')


def busy(status: int = 429, retry_after: str | None = "0", code: str = "queue_full") -> Answer:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return status, headers, f'{{"error": "too many wait", "code": "{code}"}}'


def red(mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (40, 30), "red").convert(mode)


def png() -> bytes:
    return base64.b64decode(encode_image(red()))


# Media


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda path: path, id="path"),
        pytest.param(lambda path: path.read_bytes(), id="bytes"),
        pytest.param(lambda path: bytearray(path.read_bytes()), id="bytearray"),
        pytest.param(lambda path: memoryview(path.read_bytes()), id="memoryview"),
        pytest.param(lambda path: io.BytesIO(path.read_bytes()), id="file object"),
        pytest.param(lambda path: red(), id="Pillow picture"),
        pytest.param(lambda path: red("RGBA"), id="Pillow picture with transparency"),
        pytest.param(lambda path: red("CMYK"), id="Pillow picture of a mode that PNG lacks"),
        pytest.param(lambda path: base64.b64encode(path.read_bytes()).decode(), id="base64"),
    ],
)
def test_medium_of_each_kind_reaches_the_model(client: Client, tmp_path: Path, make: Callable[[Path], Any]) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(png())

    result = client.run("image_captioning", "fake_echo", image=make(path))

    assert result[0].startswith("40x30")


def test_convenience_takes_the_name_of_a_file(client: Client, tmp_path: Path) -> None:
    (tmp_path / "Bild ä.png").write_bytes(png())

    assert client.caption(str(tmp_path / "Bild ä.png"), model="fake_echo") == [RED]


def test_convenience_takes_a_data_url(client: Client) -> None:
    url = f"data:image/png;base64,{encode_image(red())}"

    assert client.caption(url, model="fake_echo") == [RED]


def test_list_of_media_gives_a_list_of_results(client: Client) -> None:
    results = client.run("image_captioning", "fake_echo", image=[png(), encode_image(red())])

    assert results == [[RED], [RED]]


def test_list_of_one_medium_gives_a_list_of_one_result(client: Client) -> None:
    assert client.run("image_captioning", "fake_echo", image=[png()]) == [[RED]]


def test_file_is_sent_as_it_is_in_a_form(scripted: Scripted) -> None:
    server = scripted(OK)

    with Client(server.url) as client:
        client.run("image_captioning", image=png(), config={"num_beams": 2})

    (request,) = server.requests
    assert request.content_type == "multipart/form-data"
    assert png() in request.body


def test_input_without_files_is_sent_as_json(scripted: Scripted) -> None:
    server = scripted(OK)

    with Client(server.url) as client:
        client.run("text_embedding", text="ä", config=None)

    (request,) = server.requests
    assert request.content_type == "application/json"
    assert json.loads(request.body) == {"text": "ä"}


def test_server_that_takes_no_forms_is_sent_json_from_then_on(scripted: Scripted) -> None:
    refused: Answer = (415, {}, '{"error": "the body must be JSON", "code": "unsupported_media_type"}')
    server = scripted(lambda request: OK if request.content_type == "application/json" else refused)

    with Client(server.url) as client:
        answers = [client.run("image_captioning", image=png()) for _ in range(2)]

    assert answers == [["fine"], ["fine"]]
    assert [request.content_type.partition("/")[2] for request in server.requests] == ["form-data", "json", "json"]
    assert json.loads(server.requests[-1].body) == {"image": base64.b64encode(png()).decode()}


def test_file_that_cannot_be_read_is_an_os_error(client: Client, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        client.caption(tmp_path / "nothing.png", model="fake_echo")


# Functions


def test_lists_are_the_servers(client: Client, engine: Engine) -> None:
    assert client.list_tasks() == engine.list_tasks()
    assert client.list_models() == engine.list_models()
    assert client.tasks_of("fake_echo") == engine.tasks_of("fake_echo")
    assert client.models_for("fake_shout") == ["fake_echo"]
    assert client.plugins() == engine.list_plugins()


def test_model_is_started_and_stopped(client: Client) -> None:
    client.start("fake_slow")
    started = client.status("fake_slow")["state"]
    client.stop("fake_slow")

    assert started in ("starting", "loading", "running")
    assert client.status("fake_slow")["state"] in ("stopping", "stopped")


@pytest.mark.parametrize(
    ("ask", "answer"),
    [
        pytest.param(lambda c: c.caption(png(), model="fake_echo"), [RED], id="caption"),
        pytest.param(lambda c: c.caption(png(), "a", model="fake_echo"), ["40x30"], id="caption with a text"),
        pytest.param(
            lambda c: c.transcribe(recording([0.0] * 12), model="fake_echo"), "12 samples at 8000 Hz", id="transcribe"
        ),
        pytest.param(
            lambda c: c.classify(png(), ["cat", "dog"], model="fake_echo"), {"cat": 0.5, "dog": 0.5}, id="classify"
        ),
        pytest.param(
            lambda c: c.detect(png(), model="fake_echo"),
            {"boxes": [[0, 0, 40, 30]], "labels": ["picture"], "scores": [1]},
            id="detect",
        ),
        pytest.param(
            lambda c: c.transcribe(recording([0.0] * 12), "fake_scribe", {"language": "de"}, "segments")["segments"][0],
            {"start": 0, "end": 0.002, "text": "Tom & Jerry ---> <ran>"},
            id="transcribe with times",
        ),
        pytest.param(lambda c: c.run("fake_shout", text="hey", mark="?"), "HEY?", id="hand-written task"),
    ],
)
def test_convenience_gives_the_tasks_result(client: Client, ask: Callable[[Client], Any], answer: Any) -> None:
    assert ask(client) == answer


@pytest.mark.parametrize(
    ("ask", "path"),
    [
        pytest.param(lambda c: c.embed(png()), "/api/tasks/image_embedding/features", id="embed"),
        pytest.param(lambda c: c.embed_text("a", "m"), "/api/tasks/text_embedding/models/m/features", id="embed text"),
        pytest.param(lambda c: c.embed_query("a"), "/api/tasks/text_query_embedding/features", id="embed query"),
        pytest.param(lambda c: c.read(png()), "/api/tasks/optical_character_recognition/features", id="read"),
        pytest.param(lambda c: c.faces(png()), "/api/tasks/face_embedding/features", id="faces"),
        pytest.param(lambda c: c.diarize(b"a"), "/api/tasks/audio_diarization/features", id="diarize"),
        pytest.param(
            lambda c: c.detect(png(), "m", classes=["cat"]),
            "/api/tasks/zero_shot_object_detection/models/m/features",
            id="detect classes",
        ),
        pytest.param(lambda c: c.describe_task("a/b ?"), "/api/tasks/a%2Fb%20%3F", id="name with special characters"),
    ],
)
def test_function_asks_the_route_of_its_task(scripted: Scripted, ask: Callable[[Client], Any], path: str) -> None:
    server = scripted(OK)

    with Client(server.url) as client:
        ask(client)

    assert [request.path for request in server.requests] == [path]


def test_picture_is_classified_by_the_models_own_classes_without_others(scripted: Scripted) -> None:
    server = scripted((200, {}, '{"labels": ["tabby", "tiger"], "scores": [0.8, 0.1]}'))

    with Client(server.url) as client:
        classes = client.classify(png())

    assert classes == {"tabby": 0.8, "tiger": 0.1}
    assert server.requests[0].path == "/api/tasks/image_classification/features"


@pytest.mark.parametrize("image", [png(), "a text is no file"], ids=["a file", "JSON"])
def test_result_comes_with_its_origin_where_that_is_asked_for(scripted: Scripted, image: Any) -> None:
    server = scripted((200, {}, '{"result": [0.6, 0.8], "meta": {"revision": "abc"}}'))

    with Client(server.url) as client:
        answer = client.run_with_meta("image_embedding", "m", image=image)

    assert answer == ([0.6, 0.8], {"revision": "abc"})
    assert server.requests[0].path == "/api/tasks/image_embedding/models/m/features?meta=1"


def test_origin_is_that_of_the_models_weights(client: Client) -> None:
    _, meta = client.run_with_meta("image_captioning", "fake_echo", image=png())

    assert (meta["task"], meta["model"], "checkpoint" in meta) == ("image_captioning", "fake_echo", True)


def test_path_of_the_url_comes_before_every_route(scripted: Scripted) -> None:
    server = scripted(OK)

    with Client(f"{server.url}/models/") as client:
        client.list_tasks()

    assert server.requests[0].path == "/models/api/tasks/list"


def test_url_may_lack_its_scheme(scripted: Scripted) -> None:
    server = scripted(OK)

    with Client(server.url.removeprefix("http://")) as client:
        assert client.list_tasks() == ["fine"]


@pytest.mark.parametrize("url", ["", "ftp://localhost", "http://", "http://[", "file:///etc/passwd"])
def test_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is not the URL of a server"):
        Client(url)


def test_api_key_is_sent_as_a_bearer_token(scripted: Scripted) -> None:
    server = scripted(OK)

    with Client(server.url, api_key="open sesame") as client:
        client.list_tasks()

    assert server.requests[0].headers["Authorization"] == "Bearer open sesame"
    assert "sesame" not in repr(client)


def test_line_end_of_the_file_that_a_key_comes_from_is_none_of_it(scripted: Scripted) -> None:
    server = scripted(OK)

    with Client(server.url, api_key=" sesame\r\n") as client:
        client.list_tasks()

    assert server.requests[0].headers["Authorization"] == "Bearer sesame"


def test_blank_key_is_none(scripted: Scripted) -> None:
    server = scripted(OK)

    with Client(server.url, api_key="\n") as client:
        client.list_tasks()

    assert "Authorization" not in server.requests[0].headers


@pytest.mark.parametrize("key", ["сезам", "sesamé", "ses\name", "ses\0ame", "ses\udcffame"])
def test_key_that_no_header_can_have_is_refused_without_being_told(key: str) -> None:
    with pytest.raises(ValueError, match=r"^the API key has characters that no header can have$") as caught:
        Client(api_key=key)

    assert caught.value.__context__ is None


# Errors


def test_error_carries_what_the_server_says(client: Client) -> None:
    with pytest.raises(ServerError) as caught:
        client.run("image_captioning", "fake_echo", image=[png(), b"no picture"])

    error = caught.value
    assert (error.status, error.code, error.field) == (400, "invalid_input", "image[1]")
    assert error.message == str(error) == "image[1] is not an image of a known format"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        pytest.param((502, {}, "<h1>Bad Gateway</h1>"), "502 Bad Gateway", id="page of a proxy"),
        pytest.param((200, {}, "<h1>Welcome</h1>"), "200 OK", id="page of another site"),
        pytest.param((404, {}, '{"detail": "Not Found"}'), "404 Not Found", id="JSON of another API"),
        pytest.param((301, {"Location": "https://x/"}, ""), "a redirect to https://x/", id="redirect"),
    ],
)
def test_answer_of_something_else_is_told_as_such(scripted: Scripted, answer: Answer, told: str) -> None:
    server = scripted(answer)

    with Client(server.url) as client, pytest.raises(ServerError, match=told) as caught:
        client.list_tasks()

    assert caught.value.code == "unexpected_answer"


def test_port_where_nobody_listens_is_unreachable() -> None:
    url = f"http://127.0.0.1:{free_port()}"

    with Client(url) as client, pytest.raises(Unreachable, match=f"{url}: Connection refused"):
        client.list_tasks()


def test_host_that_does_not_exist_is_unreachable() -> None:
    with Client("http://nowhere.invalid") as client, pytest.raises(Unreachable, match=r"http://nowhere\.invalid: "):
        client.list_tasks()


def test_silent_server_times_out(scripted: Scripted) -> None:
    end = threading.Event()
    server = scripted(lambda request: None if end.wait(TIMEOUT_S) else OK)

    with Client(server.url, timeout=0.05) as client, pytest.raises(TimedOut, match=r"no answer within 0\.05 seconds"):
        client.list_tasks()

    end.set()
    assert len(server.requests) == 1


@pytest.mark.parametrize("timeout", [float("inf"), 1e10])
def test_timeout_may_be_longer_than_a_socket_can_wait(scripted: Scripted, timeout: float) -> None:
    server = scripted(OK)

    with Client(server.url, timeout=timeout) as client:
        assert client.list_tasks() == ["fine"]


def test_broken_connection_is_tried_once_more(scripted: Scripted) -> None:
    server = scripted(None, OK)

    with Client(server.url) as client:
        assert client.run("image_captioning", image=png()) == ["fine"]

    assert server.requests[0].body == server.requests[1].body


def test_connection_that_breaks_again_is_an_error(scripted: Scripted) -> None:
    server = scripted(None)

    with Client(server.url) as client, pytest.raises(ConnectionFailed, match="broke"):
        client.list_tasks()

    assert len(server.requests) == 2


# Retries


@pytest.mark.parametrize(
    "answer",
    [busy(), busy(503, code="model_unavailable"), (503, {"Retry-After": "0"}, "<h1>Service Unavailable</h1>")],
    ids=["429", "503", "page of a proxy"],
)
def test_busy_server_is_asked_again_when_it_says_so(scripted: Scripted, answer: Answer) -> None:
    server = scripted(answer, answer, OK)

    with Client(server.url) as client:
        assert client.run("image_captioning", image=png()) == ["fine"]

    assert len({request.body.partition(b"\r\n")[2] for request in server.requests}) == 1
    assert len(server.requests) == 3


def test_retry_waits_as_long_as_the_server_asks_for(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", waits.append)
    server = scripted(busy(retry_after="3"), busy(retry_after="86400"), OK)

    with Client(server.url) as client:
        client.list_tasks()

    assert waits == [3, 30]


def test_retries_are_bounded(scripted: Scripted) -> None:
    server = scripted(busy())

    with Client(server.url, retries=2) as client, pytest.raises(ServerError, match="too many wait") as caught:
        client.list_tasks()

    assert (caught.value.status, caught.value.code) == (429, "queue_full")
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "answer",
    [busy(503, None), busy(503, code="model_load_failed"), busy(500), busy(400)],
    ids=["503 without Retry-After", "model that cannot be loaded", "500", "400"],
)
def test_other_errors_are_not_tried_again(scripted: Scripted, answer: Answer) -> None:
    server = scripted(answer)

    with Client(server.url) as client, pytest.raises(ServerError):
        client.list_tasks()

    assert len(server.requests) == 1


# Many requests


def captions(outcomes: Iterator[Outcome]) -> list[Any]:
    return [outcome.result for outcome in outcomes]


def test_many_outcomes_come_in_the_inputs_order(client: Client) -> None:
    widths = list(range(1, 60))
    inputs = ({"image": Image.new("RGB", (width, 8))} for width in widths)

    outcomes = client.run_many("image_captioning", inputs, "fake_echo", concurrency=8)

    assert captions(outcomes) == [[f"{width}x8 (0, 0, 0)"] for width in widths]


@pytest.mark.parametrize("meta", [True, False])
def test_outcomes_tell_their_origins_where_it_is_asked_for(client: Client, meta: bool) -> None:
    good, bad = client.run_many("image_captioning", [{"image": png()}, {"image": b"?"}], "fake_echo", meta=meta)

    assert good.result == [RED]
    assert (good.meta is not None, bad.meta) == (meta, None)


def test_input_that_fails_does_not_stop_the_others(client: Client, tmp_path: Path) -> None:
    inputs: list[Any] = [png(), b"no picture", tmp_path / "nothing.png", png()]

    first, bad, missing, last = client.run_many("image_captioning", [{"image": i} for i in inputs], "fake_echo")

    assert (first.result, last.result) == ([RED], [RED])
    assert isinstance(bad.error, FesError)
    assert isinstance(missing.error, FileNotFoundError)


@pytest.mark.parametrize("bad", [{"text": "\udcff"}, {"text": "a", "\udcff": "b"}], ids=["value", "key"])
def test_input_with_what_is_no_text_does_not_stop_the_others(client: Client, bad: dict[str, Any]) -> None:
    inputs = [{"image": png()} | one for one in ({"text": "a"}, bad, {"text": "b"})]

    first, refused, last = client.run_many("conditional_image_captioning", inputs, "fake_echo")

    assert (first.result, last.result) == (["40x30"], ["40x30"])
    assert isinstance(refused.error, ServerError)
    assert refused.error.status == 400


def test_as_many_requests_run_as_are_allowed_and_no_more(scripted: Scripted) -> None:
    four_run = threading.Barrier(4)
    lock = threading.Lock()
    n_running: list[int] = [0]

    def answer(request: Request) -> Answer:
        with lock:
            n_running.append(n_running[-1] + 1)
        four_run.wait(TIMEOUT_S)
        with lock:
            n_running.append(n_running[-1] - 1)
        return OK

    server = scripted(answer)

    with Client(server.url) as client:
        outcomes = list(client.run_many("t", ({"text": str(i)} for i in range(12)), concurrency=4))

    assert [outcome.error for outcome in outcomes] == [None] * 12
    assert max(n_running) == 4


def test_inputs_are_taken_as_they_are_needed(scripted: Scripted) -> None:
    taken = itertools.count()
    server = scripted(OK)

    with Client(server.url) as client:
        outcomes = client.run_many("t", ({"text": str(i)} for i in taken), concurrency=2)
        first = [next(outcomes) for _ in range(10)]
        outcomes.close()

    assert captions(iter(first)) == [["fine"]] * 10
    assert next(taken) < 10 + 2 * 2 + 2


def test_giving_up_the_outcomes_does_not_wait_for_those_that_run(scripted: Scripted) -> None:
    end, answered = threading.Event(), threading.Event()

    def answer(request: Request) -> Answer:
        if b"first" not in request.body:
            end.wait(TIMEOUT_S / 10)
            answered.set()
        return OK

    server = scripted(answer)

    with Client(server.url) as client:
        outcomes = client.run_many("t", [{"text": "first"}, {"text": "second"}], concurrency=2)
        next(outcomes)
        outcomes.close()
        was_running = not answered.is_set()
        end.set()

    assert was_running


@pytest.mark.process
def test_many_requests_fill_the_servers_batches(gunicorn: Callable[..., Server]) -> None:
    server = gunicorn("-k", "gthread", "--threads", "100")

    with Client(server.url) as client:
        outcomes = client.run_many("image_captioning", ({"image": png()} for _ in range(100)), "fake_slow")
        calls = [outcome.result[0].split(" in a batch of ")[1].partition(",")[0] for outcome in outcomes]

    assert max(map(int, calls)) > 8
