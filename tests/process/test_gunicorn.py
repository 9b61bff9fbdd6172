"""Real gunicorn processes: clients that leave, many at once, and ends of every kind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
import requests
import trustme
from PIL import Image

from dev_server import ROOT
from tests.conftest import (
    Server,
    encode_image,
    free_port,
    gunicorn_command,
    server_environment,
    starting,
    worker_configuration,
)
from tests.http.bad_requests import CAPTION, PNG
from tests.process.raw_http import address, connect, post, read_answer
from tests.waiting import at_once, wait_until

pytestmark = pytest.mark.process

StartServer = Callable[..., Server]

THREADS = ("--preload", "--worker-class", "gthread", "--threads", "72")
SLOW = "/api/tasks/image_captioning/models/fake_slow/features"
ECHO = "/api/tasks/image_captioning/models/fake_echo/features"
GOOD = json.dumps({"image": PNG}).encode()


@pytest.fixture(params=["gunicorn", "dev_server"])
def server(request: pytest.FixtureRequest) -> StartServer:
    """Start either kind of server."""
    start: StartServer = request.getfixturevalue(request.param)
    options = ("--preload", "--worker-class", "gthread", "--threads", "4") if request.param == "gunicorn" else ()
    return lambda **settings: start(*options, **settings)


# Clients that leave, and that stall


def test_client_that_leaves_during_its_request_disturbs_nobody(server: StartServer) -> None:
    running = server(FAKE_SECONDS="0.2", LOG_LEVEL="DEBUG")
    for data in (post(SLOW, GOOD, f"Content-Length: {len(GOOD)}"), post(SLOW, GOOD[:9], "Content-Length: 999")):
        with connect(running) as connection:
            connection.sendall(data)

    assert running.post(SLOW, {"image": PNG}).ok
    assert running.get("/api/models/fake_slow/status").json()["queue_depth"] == 0


def test_requests_that_stall_do_not_block_others(gunicorn: StartServer) -> None:
    server = gunicorn("--preload", "--worker-class", "gthread", "--threads", "8")
    stalled = [connect(server) for _ in range(6)]
    for index, connection in enumerate(stalled):
        data = post(CAPTION, GOOD[:20], f"Content-Length: {len(GOOD)}")
        connection.sendall(data[: 30 if index % 2 else len(data)])

    answer = server.post(CAPTION, {"image": PNG}, timeout=20)

    for connection in stalled:
        connection.close()
    assert answer.ok


@pytest.fixture
def impatient(gunicorn: StartServer, tmp_path: Path) -> Server:
    """A server that gives up clients sooner than usual."""
    configuration = worker_configuration(tmp_path, MAX_STALL_S=1, MIN_BYTES_PER_S=1000)
    return gunicorn("-c", configuration, "--threads", "4")


def test_clients_that_vanish_within_a_request_give_their_threads_back(impatient: Server) -> None:
    request = post(ECHO, GOOD, f"Content-Length: {len(GOOD)}")
    with ExitStack() as kept_open:
        vanished = [kept_open.enter_context(connect(impatient)) for _ in range(8)]
        for index, connection in enumerate(vanished):
            connection.sendall(request[: -9 if index % 2 else 20])

        assert impatient.post(ECHO, {"image": PNG}, timeout=20).ok
        ends = [connection.recv(1000)[:12] for connection in vanished]

    assert ends == [b"", b"HTTP/1.1 400"] * 4
    assert "Traceback" not in impatient.log()


def test_a_client_that_sends_a_byte_now_and_then_is_given_up(impatient: Server) -> None:
    body = GOOD + b" " * 1000
    with connect(impatient) as connection:
        connection.sendall(post(ECHO, b"", f"Content-Length: {len(body)}"))
        connection.settimeout(0.05)
        n_sent, answer = 0, b""
        while not answer and n_sent < len(body):
            connection.sendall(body[n_sent : n_sent + 1])
            n_sent += 1
            with suppress(TimeoutError):
                answer = connection.recv(1000)

    assert answer[:12] == b"HTTP/1.1 400"
    assert n_sent < 100  # at 20 bytes a second
    assert impatient.post(ECHO, {"image": PNG}, timeout=20).ok


def test_what_comes_after_a_client_was_given_up_is_not_taken_for_a_request(impatient: Server) -> None:
    rest = b"GET /api/plugins HTTP/1.1\r\nHost: a\r\n\r\n"
    with connect(impatient) as connection:
        kept_alive = post(ECHO, b"{", f"Content-Length: {1 + len(rest)}").replace(b"Connection: close\r\n", b"")
        connection.sendall(kept_alive)
        answer = connection.recv(10_000)
        with suppress(OSError):  # it may be closed by now
            connection.sendall(rest)
            while data := connection.recv(10_000):
                answer += data

    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1") == 1


def test_a_body_that_ends_early_is_refused_even_where_it_could_be_read(server: StartServer) -> None:
    with connect(server()) as connection:
        connection.sendall(post(ECHO, GOOD, f"Content-Length: {len(GOOD) + 9}"))
        connection.shutdown(socket.SHUT_WR)
        status, _, body = read_answer(connection)

    assert status == 400
    assert f"ended before all of its {len(GOOD) + 9} bytes had come" in json.loads(body)["error"]


def test_clients_that_do_not_close_their_connections_keep_nobody_waiting(gunicorn: StartServer) -> None:
    server = gunicorn("-c", str(ROOT / "gunicorn.conf.py"))
    with ExitStack() as kept_open:
        connections = [kept_open.enter_context(connect(server)) for _ in range(30)]
        for index, connection in enumerate(connections):
            header = b"Connection: close" if index % 2 else b"Malformed"
            connection.sendall(b"GET /api/tasks/list HTTP/1.1\r\nHost: here\r\n" + header + b"\r\n\r\n")

        assert server.get("/api/tasks/list", timeout=20).ok  # gunicorn itself waits 2 s for each, one after the other
        assert [read_answer(connection)[0] for connection in connections] == [400, 200] * 15


def test_new_connections_go_to_the_worker_that_has_few(gunicorn: StartServer, tmp_path: Path) -> None:
    leave_to_others_s = 0.2
    configuration = worker_configuration(tmp_path, LEAVE_TO_OTHERS_S=leave_to_others_s, MAX_SILENCE_S=60)
    server = gunicorn("-c", configuration, "-w", "2")
    _, port = address(server)
    wait_until(lambda: len(server.workers()) == 2, "both workers")
    first, second = server.workers()

    def accepted(worker: psutil.Process) -> int:
        return sum(found.laddr.port == port and found.status == "ESTABLISHED" for found in worker.net_connections())

    with ExitStack() as kept_open:

        def connect_one_after_the_other(until: int) -> None:
            while (before := accepted(first) + accepted(second)) < until:
                kept_open.enter_context(connect(server))
                wait_until(partial(lambda n: accepted(first) + accepted(second) > n, before), "it to be accepted")

        second.suspend()
        try:
            connect_one_after_the_other(8)
        finally:
            second.resume()
        for until in range(9, 15):
            connect_one_after_the_other(until)
            time.sleep(1.5 * leave_to_others_s)  # whoever has left this one to others takes the next that it finds

        assert accepted(second) >= 5  # by chance, it would be half of the last 6


def test_clients_for_whom_there_is_no_file_descriptor_wait_until_others_have_left(
    gunicorn: StartServer, tmp_path: Path
) -> None:
    configuration = tmp_path / "few_files.py"
    configuration.write_text(
        "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (150, 150))\n"
        + Path(worker_configuration(tmp_path)).read_text()
    )
    server = gunicorn("-c", str(configuration))
    (worker,) = server.workers()
    with ExitStack() as kept_open:
        connections = [kept_open.enter_context(connect(server)) for _ in range(300)]
        wait_until(lambda: worker.num_fds() >= 149, "all file descriptors to be in use")

        for connection in connections:
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")

        assert {read_answer(connection)[0] for connection in connections} == {200}
    assert server.workers() == {worker}
    assert len(re.findall("Clients have to wait: Too many open files", server.log())) == 1


# TLS


@pytest.fixture
def start_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path | str], Server]]:
    """``start_tls(configuration)`` starts a server that speaks TLS, with a file of gunicorn's settings."""
    authority, files = trustme.CA(), {name: str(tmp_path / name) for name in ("authority.pem", "server.pem")}
    authority.cert_pem.write_to_path(files["authority.pem"])
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(files["server.pem"])
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", files["authority.pem"])
    options = ("--certfile", files["server.pem"], "--keyfile", files["server.pem"])
    servers: list[Server] = []

    def start(configuration: Path | str) -> Server:
        port = free_port()
        command = gunicorn_command(port, "-c", str(configuration), *options)
        servers.append(Server(command, port, tmp_path, server_environment(tmp_path)))
        servers[-1].url = servers[-1].url.replace("http:", "https:")
        return servers[-1].wait_until_ready()

    yield start
    for server in servers:
        server.stop()


def test_clients_are_served_over_tls_whatever_others_do_instead_of_a_handshake(
    start_tls: Callable[[Path | str], Server],
) -> None:
    tls_server = start_tls(ROOT / "gunicorn.conf.py")
    large = encode_image(Image.effect_noise((1500, 1500), 90))
    with ExitStack() as kept_open:
        others = [kept_open.enter_context(connect(tls_server)) for _ in range(50)]
        for other in others[::2]:
            other.sendall(b"GET /api/tasks/list HTTP/1.1\r\n\r\n")

        answers = at_once(32, lambda _: tls_server.post(ECHO, {"image": large}, timeout=30))

    assert [answer.json()[0].split()[0] for answer in answers] == ["1500x1500"] * 32


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        pytest.param(None, b"", id="handshake"),
        pytest.param(b"GET /api/tasks/li", b"", id="head"),
        pytest.param(post(ECHO, GOOD[:-9], f"Content-Length: {len(GOOD)}"), b"HTTP/1.1 400", id="body"),
    ],
)
def test_clients_that_stall_over_tls_are_given_up(
    start_tls: Callable[[Path | str], Server], tmp_path: Path, data: bytes | None, answer: bytes
) -> None:
    server = start_tls(worker_configuration(tmp_path, MAX_STALL_S=1))
    trusting = ssl.create_default_context(cafile=str(tmp_path / "authority.pem"))
    with connect(server) as connection:
        connection.settimeout(20)
        if data is None:
            connection.sendall(b"\x16\x03\x01\x02\x00\x01")  # how a handshake begins
            told = connection.recv(1000)
        else:
            with trusting.wrap_socket(connection, server_hostname="127.0.0.1") as wrapped:
                wrapped.sendall(data)
                told = wrapped.recv(1000)

    assert told[:12] == answer
    assert server.get("/api/tasks/list").ok


def test_a_client_that_says_nothing_does_not_put_off_the_end(gunicorn: StartServer, tmp_path: Path) -> None:
    silence_s = 60
    server = gunicorn("-c", worker_configuration(tmp_path, MAX_SILENCE_S=silence_s), "--graceful-timeout", "120")
    with connect(server):
        assert server.get("/api/tasks/list").ok  # the other client has been let in before
        began = time.monotonic()
        server.process.terminate()
        assert server.process.wait(2 * silence_s) == 0

    assert time.monotonic() - began < silence_s / 2


EXITS = """
import sys
def add_routes(application, app):
    app.add_url_rule("/exit/<int:status>", view_func=lambda status: sys.exit(status))
"""


def test_a_plugin_that_ends_the_program_in_a_request_ends_neither_the_worker_nor_the_server(
    gunicorn: StartServer, tmp_path: Path
) -> None:
    api = tmp_path / "feature_extraction_server" / "apis" / "exits.py"
    api.parent.mkdir(parents=True)
    api.write_text(EXITS)
    server = gunicorn("-c", str(ROOT / "gunicorn.conf.py"))  # finds the api in its working directory
    workers = server.workers()

    answers = [server.get(f"/exit/{status}") for status in (1, 4)]

    assert [answer.status_code for answer in answers] == [500, 500]
    assert [answer.json()["code"] for answer in answers] == ["internal_error"] * 2
    assert server.workers() == workers


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
    server = gunicorn("-w", "2", *THREADS, FAKE_SECONDS="0.5")
    server.post(SLOW, {"image": PNG})

    answers = at_once(64, lambda _: server.post(SLOW, {"image": PNG}))

    last = max(int(call) for answer in answers for call in re.findall(r"call (\d+)", answer.json()[0]))
    assert last - 1 <= 16


@pytest.mark.parametrize("consumer_type", ["single_thread_consumer", "process_consumer"])
def test_each_of_many_pictures_at_once_gets_its_own_answer(gunicorn: StartServer, consumer_type: str) -> None:
    server = gunicorn("-w", "2", *THREADS, FAKE_ECHO_CONSUMER_TYPE=consumer_type)
    greys = [7 * number % 256 for number in range(200)]  # a JPEG of one grey has it exactly
    pictures = [encode_image(Image.new("RGB", (640 + grey, 480), (grey, grey, grey)), "JPEG") for grey in greys]

    alone = at_once(200, lambda index: server.post(ECHO, {"image": pictures[index]}).json())
    together = server.post(ECHO, {"image": pictures}).json()

    expected = [[f"{640 + grey}x480 {(grey, grey, grey)}"] for grey in greys]
    assert alone == expected
    assert together == expected


def test_result_check_interval_adds_no_latency(gunicorn: StartServer) -> None:
    server = gunicorn(*THREADS, RESULT_CHECK_INTERVAL="60", FAKE_SECONDS="0.01", FAKE_LOAD_SECONDS="0")

    begun = time.monotonic()
    answers = [server.post(SLOW, {"image": PNG}) for _ in range(5)]
    seconds = time.monotonic() - begun

    assert all(answer.ok for answer in answers)
    assert seconds < 60


# Ends


def children(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def test_killed_worker_is_replaced_and_no_client_sees_html(gunicorn: StartServer) -> None:
    server = gunicorn("-w", "1", "--preload", "--worker-class", "gthread", "--threads", "8")
    server.post(CAPTION, {"image": PNG})
    (worker,) = server.workers()

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


def test_a_gunicorn_that_upgrades_itself_may_use_all_cores(tmp_path: Path) -> None:
    program = str(Path(sys.executable).with_name("gunicorn"))  # "python -m gunicorn" cannot upgrade itself

    def command(port: int, *arguments: str) -> list[str]:
        return [program, *gunicorn_command(port, *arguments)[3:]]

    with starting(tmp_path, command) as start:
        server = start("--preload")
        master = psutil.Process(server.process.pid)

        master.send_signal(signal.SIGUSR2)

        wait_until(lambda: any(child.children() for child in master.children()), "the new one's worker")
        (upgraded,) = (child for child in master.children() if child.children())
        cores = upgraded.cpu_affinity()
        upgraded.terminate()
        upgraded.wait(60)
        assert cores == master.cpu_affinity()


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
