"""Images and recordings that a request names by URL."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest
from flask.testing import FlaskClient

from feature_extraction_server.core.engine import Engine
from feature_extraction_server.flask.app import create_app
from tests.http.bad_requests import CAPTION, CONDITIONAL, PNG, SPEECH
from tests.http.conftest import MakeClient, json_of
from tests.http.test_bodies import SOUND, TALL, WIDE
from tests.waiting import TIMEOUT_S

FILES = {"/wide.png": WIDE, "/tall.png": TALL, "/sound.wav": SOUND, "/empty": b"", "/text": b"hello"}


@pytest.fixture
def site() -> Iterator[str]:
    """The URL of a server on loopback that has ``FILES``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in FILES else 404)
            self.end_headers()
            self.wfile.write(FILES.get(self.path, b""))

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(TIMEOUT_S)


@pytest.fixture
def client(build: Callable[..., Engine]) -> FlaskClient:
    """A client of an app that may connect to 127.0.0.1, as no server of a user may."""
    engine = build(ALLOWED_URL_HOSTS="127.0.0.1", MAX_CONTENT_LENGTH="100000")
    urls = replace(engine.limits.urls, may_connect=lambda address: address == "127.0.0.1")
    engine.limits = replace(engine.limits, urls=urls)
    return create_app(engine).test_client()


def test_image_may_be_a_url(client: FlaskClient, site: str) -> None:
    assert json_of(client.post(CAPTION, json={"image": f"{site}/wide.png"})) == ["40x30 (255, 0, 0)"]


def test_recording_may_be_a_url(client: FlaskClient, site: str) -> None:
    assert json_of(client.post(SPEECH, json={"audio": f"{site}/sound.wav"})) == "80 samples at 8000 Hz"


def test_urls_and_base64_may_be_mixed_in_a_batch(client: FlaskClient, site: str) -> None:
    images = [f"{site}/tall.png", PNG, f"{site}/wide.png"]

    result = json_of(client.post(CAPTION, json={"image": images}))

    assert result == [["20x60 (0, 0, 255)"], ["40x30 (255, 0, 0)"], ["40x30 (255, 0, 0)"]]


def test_text_field_of_a_form_may_be_a_url(client: FlaskClient, site: str) -> None:
    data = {"image": [f"{site}/tall.png", (io.BytesIO(WIDE), "a.png")]}

    result = json_of(client.post(CAPTION, data=data, content_type="multipart/form-data"))

    assert sorted(result) == [["20x60 (0, 0, 255)"], ["40x30 (255, 0, 0)"]]


def test_url_where_a_text_belongs_is_a_text(client: FlaskClient) -> None:
    response = client.post(CONDITIONAL, json={"image": PNG, "text": "https://example.org/"})

    assert response.status_code == 200


@pytest.mark.parametrize(
    ("image", "field", "word"),
    [
        pytest.param("{site}/none.png", "image", "image cannot be fetched: 127.0.0.1 answered 404", id="not there"),
        pytest.param("{site}/empty", "image", "image is empty", id="empty"),
        pytest.param("{site}/text", "image", "image is not an image", id="a text"),
        pytest.param(["{site}/wide.png", "{site}/none.png"], "image[1]", "image[1] cannot", id="one of two"),
        pytest.param(["{site}/wide.png", "{site}/text"], "image[1]", "image[1] is not", id="a text among images"),
        pytest.param("http://127.0.0.2/", "image", "127.0.0.2 is not one that this server fetches from", id="host"),
        pytest.param("file:///etc/passwd", "image", "only http and https", id="a file"),
    ],
)
def test_url_that_gives_no_image_is_told(
    client: FlaskClient, site: str, image: str | list[str], field: str, word: str
) -> None:
    urls = image.format(site=site) if isinstance(image, str) else [url.format(site=site) for url in image]

    response = client.post(CAPTION, json={"image": urls})

    assert (response.status_code, json_of(response)["code"]) == (400, "invalid_input")
    assert (json_of(response)["field"], word in json_of(response)["error"]) == (field, True)


def test_file_larger_than_a_body_may_be_is_refused(client: FlaskClient, site: str, monkeypatch: Any) -> None:
    monkeypatch.setitem(FILES, "/large", b"x" * 100_001)

    response = client.post(CAPTION, json={"image": f"{site}/large"})

    assert (response.status_code, json_of(response)["code"]) == (413, "too_large")
    assert json_of(response)["field"] == "image"


def test_fetching_is_off_by_default_and_says_how_it_is_switched_on(client_with: MakeClient) -> None:
    response = client_with().post(CAPTION, json={"image": ["https://example.org/a.png"]})

    assert (response.status_code, json_of(response)["field"]) == (400, "image[0]")
    assert "switched off: the setting ALLOWED_URL_HOSTS switches it on" in json_of(response)["error"]


def test_allowed_hosts_are_a_list_in_any_spelling(build: Callable[..., Engine]) -> None:
    engine = build(ALLOWED_URL_HOSTS=" Example.org., bücher.example,,10.0.0.1 ", URL_TIMEOUT="7", REQUEST_TIMEOUT="9")

    assert engine.limits.urls.allowed_hosts == {"example.org", "xn--bcher-kva.example", "10.0.0.1"}
    assert engine.limits.urls.timeout_s == 7


def test_files_are_not_fetched_for_longer_than_a_request_may_take(build: Callable[..., Engine]) -> None:
    assert build(REQUEST_TIMEOUT="3").limits.urls.timeout_s == 3
