"""The playground's page and its files, as they are served."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from flask.testing import FlaskClient
from werkzeug.test import EnvironBuilder, TestResponse

from feature_extraction_server.apis import playground
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.flask.app import create_app

FILES = sorted(path.name for path in (Path(playground.__file__).parent / "static").iterdir())


def fetch(client: FlaskClient, path: str) -> TestResponse:
    """Return an answer whose file has been read and closed."""
    response = client.get(path)
    with response:
        response.get_data()
    return response


def test_page_is_at_the_root(client: FlaskClient) -> None:
    page = fetch(client, "/")

    assert (page.status_code, page.mimetype) == (200, "text/html")
    assert "<h1>Feature Extraction Server</h1>" in page.text


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_served_as_what_it_is(client: FlaskClient, name: str) -> None:
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}

    file = fetch(client, f"/playground/{name}")

    assert (file.status_code, file.mimetype) == (200, kinds[name.rpartition(".")[2]])
    assert "default-src 'none'" in file.headers["Content-Security-Policy"]


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_host_or_has_absolute_paths(client: FlaskClient, name: str) -> None:
    text = fetch(client, f"/playground/{name}").text.replace("http://www.w3.org/2000/svg", "")

    assert re.findall(r"https?://|(?:src|href)=\"/|from \"/|url\(/", text) == []


@pytest.mark.parametrize("name", ["nothing.js", "..%2f__init__.py", "__init__.py"])
def test_no_other_file_is_given_out(client: FlaskClient, name: str) -> None:
    assert client.get(f"/playground/{name}").status_code == 404


def test_page_and_its_files_need_no_key_but_what_they_ask_for_does(build: Callable[..., Engine]) -> None:
    client = create_app(build(API_KEYS="s3same")).test_client()

    paths = ["/", "/playground/app.js", "/api/tasks/list", "/api/models/list"]
    assert [fetch(client, path).status_code for path in paths] == [200, 200, 401, 401]


def test_prefix_without_its_slash_leads_to_the_page(client: FlaskClient) -> None:
    environ = EnvironBuilder(path="/", base_url="http://localhost/fes").get_environ() | {"PATH_INFO": ""}

    response = client.open(environ)

    assert (response.status_code, response.headers["Location"]) == (302, "/fes/")
