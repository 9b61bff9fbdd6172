"""Bad requests and bodies of every form, as clients send them to both kinds of servers, which answer on."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.conftest import Server, dev_server_command, gunicorn_command, starting
from tests.http.bad_requests import BAD_REQUESTS, CAPTION, PNG, SETTINGS, BadRequest, faults
from tests.process.raw_http import address, connect, post, read_answer, send

pytestmark = pytest.mark.process

GOOD = json.dumps({"image": PNG}).encode()

on_gunicorn = pytest.mark.parametrize("server", ["gunicorn"], indirect=True)


@pytest.fixture(scope="module", params=["gunicorn", "dev_server"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Either kind of server, with the bad requests' settings. No test changes anything there."""
    is_gunicorn = request.param == "gunicorn"
    command = gunicorn_command if is_gunicorn else dev_server_command
    options = ("--preload", "--worker-class", "gthread", "--threads", "4") if is_gunicorn else ()
    with starting(tmp_path_factory.mktemp("server"), command) as start:
        yield start(*options, **SETTINGS)


@pytest.fixture(scope="module")
def lasting_process(server: Server) -> psutil.Process:
    return psutil.Process(server.process.pid)


def chunked(body: bytes, size: int) -> bytes:
    chunks = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])


def ask(server: Server, bad: BadRequest) -> list[str]:
    connection = http.client.HTTPConnection(*address(server), timeout=30)
    try:
        headers = {"Content-Type": bad.content_type} if bad.content_type else {}
        connection.request(bad.method, bad.path, bad.body, headers)
        response = connection.getresponse()
        return faults(bad, response.status, response.getheader("Content-Type"), response.read())
    finally:
        connection.close()


@on_gunicorn
def test_server_answers_right_after_every_bad_request(server: Server) -> None:
    n_logged = len(server.log())

    found: dict[str, Any] = {}
    for bad in BAD_REQUESTS:
        wrong = ask(server, bad)
        afterwards = server.post(CAPTION, {"image": PNG})
        if wrong or afterwards.json() != ["40x30 (255, 0, 0)"]:
            found[bad.name] = wrong, afterwards.text

    assert found == {}
    assert "Traceback" not in server.log()[n_logged:]


def test_body_that_is_too_large_is_refused_after_it_was_sent_completely(server: Server) -> None:
    body = json.dumps({"image": "A" * 30_000_000}).encode()

    status, headers, answer = send(server, post(CAPTION, body, f"Content-Length: {len(body)}"))

    assert (status, headers["content-type"]) == (413, "application/json")
    assert json.loads(answer)["code"] == "too_large"


@pytest.mark.parametrize("path", [CAPTION, "/api/models/nobody/tasks/image_captioning/features", "/nowhere"])
def test_client_libraries_see_the_refusal_of_a_large_body(server: Server, path: str) -> None:
    body = json.dumps({"image": "A" * 30_000_000}).encode()

    with requests.Session() as session:
        answers = [
            session.post(server.url + path, data=body, headers={"Content-Type": "application/json"}, timeout=60)
            for _ in range(2)
        ]

    assert [answer.status_code for answer in answers] == [413 if path == CAPTION else 404] * 2


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_sees_the_refusal_of_a_large_body(server: Server, tmp_path: Path) -> None:
    body = tmp_path / "body.json"
    body.write_bytes(b'{"image": "' + b"A" * 30_000_000)

    command = ["curl", "-sS", "-H", "Content-Type: application/json", "--data-binary", f"@{body}", server.url + CAPTION]
    result = subprocess.run(command, capture_output=True, timeout=60, check=True)

    assert json.loads(result.stdout)["code"] == "too_large"
    assert result.stderr == b""


@pytest.mark.parametrize("chunk_size", [100, 100_000])
def test_chunked_body_is_taken(server: Server, chunk_size: int) -> None:
    data = post(CAPTION, chunked(GOOD, chunk_size), "Transfer-Encoding: chunked")

    status, _, answer = send(server, data)

    assert (status, json.loads(answer)) == (200, ["40x30 (255, 0, 0)"])


def test_chunked_body_that_is_too_large_is_refused(server: Server) -> None:
    body = chunked(GOOD.ljust(3_000_000), 65536)

    status, _, answer = send(server, post(CAPTION, body, "Transfer-Encoding: chunked"))

    assert status == 413
    assert json.loads(answer)["code"] == "too_large"


@on_gunicorn
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"zz\r\n{}\r\n0\r\n\r\n", id="a size that is no number"),
        pytest.param(b"2\r\n{}xx0\r\n\r\n", id="a chunk longer than its size"),
    ],
)
def test_malformed_chunks_are_refused(server: Server, body: bytes) -> None:
    status, headers, answer = send(server, post(CAPTION, body, "Transfer-Encoding: chunked"))

    assert (status, headers["content-type"]) == (400, "application/json")
    assert json.loads(answer)["code"] == "invalid_input"


def test_body_that_ends_early_is_refused_and_the_next_request_answered(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(post(CAPTION, GOOD[:20], f"Content-Length: {len(GOOD)}"))
        connection.shutdown(socket.SHUT_WR)
        status, headers, _ = read_answer(connection)

    assert (status, headers["content-type"]) == (400, "application/json")
    assert server.post(CAPTION, {"image": PNG}).ok


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS"])
def test_head_and_options_have_no_body(server: Server, method: str) -> None:
    answer = requests.request(method, server.url + "/api/tasks/list", timeout=30)

    assert (answer.status_code, len(answer.content)) == (200, 0)
