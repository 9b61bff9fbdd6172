"""What a client got wrong is told in a JSON sentence.

That a server answers afterwards is shown in tests/process, where all of the table meets one gunicorn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from flask.testing import FlaskClient

from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.setup import build_engine
from feature_extraction_server.flask.app import create_app
from tests.http.bad_requests import BAD_REQUESTS, CAPTION, PNG, SETTINGS, BadRequest, faults


@pytest.fixture
def client(build: Callable[..., Engine]) -> FlaskClient:
    return create_app(build(**SETTINGS)).test_client()


@pytest.fixture(scope="module")
def shared_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine for all of the table: its requests change nothing there."""
    folder = tmp_path_factory.mktemp("engine")
    engine = build_engine(SettingsManager({"LOG_PATH": str(folder / "log.txt")} | SETTINGS, folder / ".env"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def shared_client(shared_engine: Engine) -> FlaskClient:
    return create_app(shared_engine).test_client()


@pytest.fixture
def refusing(shared_client: FlaskClient, shared_engine: Engine) -> Iterator[FlaskClient]:
    """A client of the shared engine. A model that decodes a request's pictures is stopped again."""
    yield shared_client
    shared_engine.stop("fake_echo", wait=True)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("bad", [pytest.param(request, id=request.name) for request in BAD_REQUESTS])
def test_bad_request_is_told_what_is_wrong(refusing: FlaskClient, bad: BadRequest) -> None:
    answer = refusing.open(bad.path, method=bad.method, data=bad.body, content_type=bad.content_type)

    assert faults(bad, answer.status_code, answer.content_type, answer.data) == []


def test_names_of_bad_requests_are_unique() -> None:
    assert len({request.name for request in BAD_REQUESTS}) == len(BAD_REQUESTS)


def test_body_may_begin_with_a_byte_order_mark(client: FlaskClient) -> None:
    body = b"\xef\xbb\xbf" + f'{{"image": "{PNG}"}}'.encode()

    answer = client.post(CAPTION, data=body, content_type="application/json")

    assert answer.status_code == 200


def test_body_of_exactly_the_largest_size_is_taken(client: FlaskClient) -> None:
    body = f'{{"image": "{PNG}"}}'.encode().ljust(int(SETTINGS["MAX_CONTENT_LENGTH"]))

    answer = client.post(CAPTION, data=body, content_type="application/json")

    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("n_spaces", "status"),
    [pytest.param(0, 200, id="as many bytes as allowed"), pytest.param(1, 413, id="one byte more")],
)
def test_body_of_undeclared_length_is_bounded(client: FlaskClient, n_spaces: int, status: int) -> None:
    body = f'{{"image": "{PNG}"}}'.encode().ljust(int(SETTINGS["MAX_CONTENT_LENGTH"]) + n_spaces)

    answer = client.post(
        CAPTION,
        data=body,
        content_type="application/json",
        environ_overrides={"CONTENT_LENGTH": "", "HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True},
    )

    assert answer.status_code == status


def test_other_json_types_are_taken(client: FlaskClient) -> None:
    body = f'{{"image": "{PNG}"}}'

    answer = client.post(CAPTION, data=body, content_type="application/vnd.api+json; charset=utf-8")

    assert answer.status_code == 200
