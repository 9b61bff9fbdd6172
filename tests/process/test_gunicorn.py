"""Real gunicorn processes: HTTP as clients send it, many at once, and ends of every kind."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from PIL import Image

from tests.conftest import Server, encode_image, free_port, server_environment
from tests.http.bad_requests import BAD_REQUESTS, CAPTION, PNG, SETTINGS, BadRequest, faults
from tests.waiting import at_once, wait_until

pytestmark = pytest.mark.process

StartServer = Callable[..., Server]

THREADS = ("--preload", "--worker-class", "gthread", "--threads", "72")
SLOW = "/api/tasks/image_captioning/models/fake_slow/features"
GOOD = json.dumps({"image": PNG}).encode()


def address(server: Server) -> tuple[str, int]:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return host, int(port)


def send(server: Server, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send all of ``data`` before reading anything, and return the answer's status, headers and body."""
    with socket.create_connection(address(server), timeout=30) as connection:
        connection.sendall(data)
        return read_answer(connection)


def read_answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


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


@pytest.fixture(params=["gunicorn", "dev_server"])
def server(request: pytest.FixtureRequest) -> StartServer:
    """Start either kind of server, with the bad requests' settings."""
    start: StartServer = request.getfixturevalue(request.param)
    options = ("--preload", "--worker-class", "gthread", "--threads", "4") if request.param == "gunicorn" else ()
    return lambda **settings: start(*options, **(SETTINGS | settings))


# Bad requests


def test_server_answers_right_after_every_bad_request(gunicorn: StartServer) -> None:
    server = gunicorn("--preload", "--threads", "4", **SETTINGS)

    found: dict[str, Any] = {}
    for bad in BAD_REQUESTS:
        wrong = ask(server, bad)
        afterwards = server.post(CAPTION, {"image": PNG})
        if wrong or afterwards.json() != ["40x30 (255, 0, 0)"]:
            found[bad.name] = wrong, afterwards.text

    assert found == {}
    assert "Traceback" not in server.log()


def test_body_that_is_too_large_is_refused_after_it_was_sent_completely(server: StartServer) -> None:
    body = json.dumps({"image": "A" * 30_000_000}).encode()

    status, headers, answer = send(server(), post(CAPTION, body, f"Content-Length: {len(body)}"))

    assert (status, headers["content-type"]) == (413, "application/json")
    assert json.loads(answer)["code"] == "too_large"


@pytest.mark.parametrize("path", [CAPTION, "/api/models/nobody/tasks/image_captioning/features", "/nowhere"])
def test_client_libraries_see_the_refusal_of_a_large_body(gunicorn: StartServer, path: str) -> None:
    server = gunicorn("--preload", "--worker-class", "gthread", "--threads", "4", **SETTINGS)
    body = json.dumps({"image": "A" * 30_000_000}).encode()

    with requests.Session() as session:
        answers = [
            session.post(server.url + path, data=body, headers={"Content-Type": "application/json"}, timeout=60)
            for _ in range(2)
        ]

    assert [answer.status_code for answer in answers] == [413 if path == CAPTION else 404] * 2


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_sees_the_refusal_of_a_large_body(server: StartServer, tmp_path: Path) -> None:
    body = tmp_path / "body.json"
    body.write_bytes(b'{"image": "' + b"A" * 30_000_000)
    url = server().url + CAPTION

    command = ["curl", "-sS", "-H", "Content-Type: application/json", "--data-binary", f"@{body}", url]
    result = subprocess.run(command, capture_output=True, timeout=60, check=True)

    assert json.loads(result.stdout)["code"] == "too_large"
    assert result.stderr == b""


@pytest.mark.parametrize("chunk_size", [100, 100_000])
def test_chunked_body_is_taken(server: StartServer, chunk_size: int) -> None:
    data = post(CAPTION, chunked(GOOD, chunk_size), "Transfer-Encoding: chunked")

    status, _, answer = send(server(), data)

    assert (status, json.loads(answer)) == (200, ["40x30 (255, 0, 0)"])


def test_chunked_body_that_is_too_large_is_refused(server: StartServer) -> None:
    body = chunked(GOOD.ljust(3_000_000), 65536)

    status, _, answer = send(server(), post(CAPTION, body, "Transfer-Encoding: chunked"))

    assert status == 413
    assert json.loads(answer)["code"] == "too_large"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"zz\r\n{}\r\n0\r\n\r\n", id="a size that is no number"),
        pytest.param(b"2\r\n{}xx0\r\n\r\n", id="a chunk longer than its size"),
    ],
)
def test_malformed_chunks_are_refused(gunicorn: StartServer, body: bytes) -> None:
    server = gunicorn("--preload", "--worker-class", "gthread", "--threads", "4")

    status, headers, answer = send(server, post(CAPTION, body, "Transfer-Encoding: chunked"))

    assert (status, headers["content-type"]) == (400, "application/json")
    assert json.loads(answer)["code"] == "invalid_input"


def test_body_that_ends_early_is_refused_and_the_next_request_answered(server: StartServer) -> None:
    running = server()
    with socket.create_connection(address(running), timeout=30) as connection:
        connection.sendall(post(CAPTION, GOOD[:20], f"Content-Length: {len(GOOD)}"))
        connection.shutdown(socket.SHUT_WR)
        status, headers, _ = read_answer(connection)

    assert (status, headers["content-type"]) == (400, "application/json")
    assert running.post(CAPTION, {"image": PNG}).ok


def test_client_that_leaves_during_its_request_disturbs_nobody(server: StartServer) -> None:
    running = server(FAKE_SECONDS="0.2", LOG_LEVEL="DEBUG")
    for data in (post(SLOW, GOOD, f"Content-Length: {len(GOOD)}"), post(SLOW, GOOD[:9], "Content-Length: 999")):
        with socket.create_connection(address(running), timeout=30) as connection:
            connection.sendall(data)

    assert running.post(SLOW, {"image": PNG}).ok
    assert running.get("/api/models/fake_slow/status").json()["queue_depth"] == 0


def test_requests_that_stall_do_not_block_others(gunicorn: StartServer) -> None:
    server = gunicorn("--preload", "--worker-class", "gthread", "--threads", "8")
    stalled = [socket.create_connection(address(server), timeout=30) for _ in range(6)]
    for index, connection in enumerate(stalled):
        data = post(CAPTION, GOOD[:20], f"Content-Length: {len(GOOD)}")
        connection.sendall(data[: 30 if index % 2 else len(data)])

    answer = server.post(CAPTION, {"image": PNG}, timeout=20)

    for connection in stalled:
        connection.close()
    assert answer.ok


@pytest.mark.parametrize(("method", "n_bytes"), [("HEAD", 0), ("OPTIONS", 0)])
def test_head_and_options_have_no_body(server: StartServer, method: str, n_bytes: int) -> None:
    answer = requests.request(method, server().url + "/api/tasks/list", timeout=30)

    assert (answer.status_code, len(answer.content)) == (200, n_bytes)


# Many at once


def test_first_requests_at_once_load_a_model_once(gunicorn: StartServer) -> None:
    server = gunicorn("-w", "2", *THREADS, FAKE_LOAD_SECONDS="0.3", FAKE_SECONDS="0.01")

    answers = at_once(64, lambda _: server.post(SLOW, {"image": PNG}))

    assert [answer.status_code for answer in answers] == [200] * 64
    assert {load for answer in answers for load in re.findall(r"load (\d+)", answer.json()[0])} == {"1"}


def test_requests_at_once_share_calls_and_a_poisoned_one_fails_alone(gunicorn: StartServer) -> None:
    server = gunicorn("-w", "2", *THREADS, FAKE_SECONDS="0.1")
    server.post(SLOW, {"image": PNG})
    widths = [1 if index == 40 else index + 2 for index in range(64)]
    images = [encode_image(Image.new("RGB", (width, 5))) for width in widths]

    answers = at_once(64, lambda index: server.post(SLOW, {"image": images[index]}))

    good = [answer for answer in answers if answer.ok]
    n_calls = int(re.findall(r"call (\d+)", server.post(SLOW, {"image": PNG}).json()[0])[0]) - 2
    batches = [int(answer.json()[0].split()[5].rstrip(",")) for answer in good]
    assert [answer.status_code for answer in answers] == [500 if width == 1 else 200 for width in widths]
    assert [int(answer.json()[0].split()[0]) for answer in good] == [width for width in widths if width != 1]
    assert answers[40].json()["code"] == "model_error"
    assert max(batches) > 1
    # Where the poisoned batch was run apart, each of its items took a call of its own.
    assert n_calls < 64


def test_requests_at_once_take_few_calls(gunicorn: StartServer) -> None:
    server = gunicorn("-w", "2", *THREADS, FAKE_SECONDS="0.1")
    server.post(SLOW, {"image": PNG})

    answers = at_once(64, lambda _: server.post(SLOW, {"image": PNG}))

    last = max(int(call) for answer in answers for call in re.findall(r"call (\d+)", answer.json()[0]))
    assert last - 1 <= 16


def test_result_check_interval_adds_no_latency(gunicorn: StartServer) -> None:
    server = gunicorn(*THREADS, RESULT_CHECK_INTERVAL="5", FAKE_SECONDS="0.01", FAKE_LOAD_SECONDS="0")

    begun = time.monotonic()
    answers = [server.post(SLOW, {"image": PNG}) for _ in range(5)]
    seconds = time.monotonic() - begun

    assert all(answer.ok for answer in answers)
    assert seconds < 5


# Ends


def children(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT], ids=lambda sent: sent.name)
@pytest.mark.parametrize("arguments", [("-w", "2", "--preload"), ("-w", "2")], ids=["preload", "no preload"])
def test_signal_ends_all_processes(gunicorn: StartServer, arguments: tuple[str, ...], sent: signal.Signals) -> None:
    server = gunicorn(*arguments)
    server.post(CAPTION, {"image": PNG})
    started = children(server)

    server.process.send_signal(sent)

    assert server.process.wait(30) == 0
    _, left = psutil.wait_procs(started, timeout=30)
    assert left == []


def test_killed_worker_is_replaced_and_no_client_sees_html(gunicorn: StartServer) -> None:
    server = gunicorn("-w", "1", "--preload", "--worker-class", "gthread", "--threads", "8")
    server.post(CAPTION, {"image": PNG})
    (worker,) = [child for child in children(server) if "gunicorn" in " ".join(child.cmdline())]

    os.kill(worker.pid, signal.SIGKILL)
    answers: list[requests.Response] = []

    def answered() -> bool:
        try:
            answers.append(server.post(CAPTION, {"image": PNG}))
        except requests.ConnectionError:
            return False
        return answers[-1].ok

    wait_until(answered, "an answer of the next worker")
    assert {answer.headers["Content-Type"] for answer in answers} == {"application/json"}


# Logs


def test_lines_of_several_processes_do_not_mix(gunicorn: StartServer, tmp_path: Path) -> None:
    server = gunicorn("-w", "2", *THREADS, FAKE_SECONDS="0")
    narrow = encode_image(Image.new("RGB", (1, 1)))

    at_once(32, lambda _: server.post(SLOW, {"image": narrow}))

    lines = (tmp_path / "log.txt").read_text().splitlines()
    begin = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ \[\d+ [^]]+\] feature_extraction_server")
    records = [line for line in lines if begin.match(line)]
    assert [line for line in lines if begin.search(line) and not begin.match(line)] == []
    assert sum("failed on the task image_captioning" in line for line in records) >= 1
    assert lines.count("RuntimeError: one pixel wide") == sum("failed on the task" in line for line in records)


# Settings


def run_to_its_end(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{free_port()}", *arguments]
    target = "feature_extraction_server.flask.entrypoint:entrypoint()"
    return subprocess.run(
        [*command, target],
        cwd=folder,
        env=server_environment(folder, **settings),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_bad_setting_ends_gunicorn_before_it_listens(tmp_path: Path) -> None:
    result = run_to_its_end(tmp_path, "--preload", REQUEST_TIMEOUT="never")

    assert result.returncode == 2
    assert result.stderr == (
        "feature_extraction_server: REQUEST_TIMEOUT='never' is not allowed: "
        "it must be a number from 0.001 to 100000000\n"
    )


def test_bad_setting_ends_gunicorn_without_preload_too(tmp_path: Path) -> None:
    result = run_to_its_end(tmp_path, "-w", "2", REQUEST_TIMEOUT="never")

    assert result.returncode != 0
    assert "REQUEST_TIMEOUT='never' is not allowed" in result.stderr
    assert "in entrypoint" not in result.stderr  # no traceback of ours; gunicorn shows its own
