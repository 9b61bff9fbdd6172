"""The benchmark script's own arithmetic and set-up. What it measures is not tested here."""

from __future__ import annotations

import http.server
import io
import itertools
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from benchmarks import bench
from benchmarks.bench import (
    BENCHMARKS,
    DIRECT,
    SERVERS,
    Benchmark,
    Contender,
    Failed,
    Results,
    agree,
    contenders,
    install,
    is_running,
    machine,
    parse,
    stop,
    table,
    used_s,
    warning,
)
from benchmarks.load import Measurement, choose_generator, measure, quantile
from benchmarks.workloads import WORKLOADS, MeanColour, jpeg

OURS, FLASK_1, FLASK_2, MOSEC = (
    Contender("ours", 2),
    Contender("flask", 1),
    Contender("flask", 2),
    Contender("mosec", 2),
)


def measured(requests_per_s: float, n_errors: int = 0) -> Measurement:
    return Measurement(requests_per_s, p50_ms=1.0, p99_ms=2.0, n_errors=n_errors)


def cells(results: Results, *taking_part: Contender) -> dict[tuple[str, str], dict[str, str]]:
    """Return a table's cells by server and processes, then by column."""
    header, _, *rows = [line.strip("| ").split(" | ") for line in table(results, "W0", 32, taking_part)]
    return {(row[0], row[1]): dict(zip(header, row, strict=False)) for row in rows}


def test_bare_flask_also_runs_with_a_worker_for_each_web_worker_of_ours() -> None:
    assert contenders(["ours", "flask", "mosec"], [2]) == [OURS, FLASK_1, FLASK_2, MOSEC]


@pytest.mark.parametrize(("connections", "expected_s"), [(1, 10), (32, 25.6), (256, 51.2)])
def test_a_slow_model_is_measured_for_eight_batches_and_two_answers_a_connection(
    connections: int, expected_s: float
) -> None:
    benchmark = Benchmark(parse(["--seconds", "10"]))
    benchmark.results.add("W3", DIRECT, connections, measured(10.0))

    assert benchmark.seconds("W3", connections) == expected_s


def test_what_takes_as_long_as_all_rounds_is_measured_in_one() -> None:
    benchmark = Benchmark(parse(["--seconds", "10", "--rounds", "3"]))
    for connections, requests_per_s in [(1, 100.0), (32, 20.0), (256, 17.0)]:  # 10, 12.8 and 30.1 s
        benchmark.results.add("W3", DIRECT, connections, measured(requests_per_s))

    assert [benchmark.due("W3", n_rounds) for n_rounds in range(4)] == [[1, 32, 256], [1, 32], [1, 32], []]


def test_nobody_takes_part_twice() -> None:
    taking_part = contenders(["flask"], [2, 3])

    assert [one.n_processes for one in taking_part] == [1, 2, 3]


@pytest.mark.parametrize(
    ("part", "expected"), [pytest.param(0.5, 50, id="median"), pytest.param(0.99, 99, id="99th percentile")]
)
def test_a_quantile_is_a_value_that_was_measured(part: float, expected: float) -> None:
    assert quantile([float(value) for value in range(1, 101)], part) == expected


def test_the_median_of_the_rounds_counts_and_all_errors_do() -> None:
    results = Results()

    for rate in (100.0, 1.0, 110.0):
        results.add("W0", OURS, 32, measured(rate, n_errors=1))

    assert results.median("W0", OURS, 32) == measured(100.0, n_errors=3)


def test_a_row_is_compared_with_flask_with_the_best_equal_peer_and_with_direct_calls() -> None:
    results = Results()
    for contender, rate in ((OURS, 600.0), (FLASK_1, 300.0), (FLASK_2, 400.0), (MOSEC, 800.0), (DIRECT, 1200.0)):
        results.add("W0", contender, 32, measured(rate))

    row = cells(results, DIRECT, OURS, FLASK_1, FLASK_2, MOSEC)["**this server**", "2"]

    assert (row["x bare Flask"], row["x best peer"], row["x direct"]) == ("2.00", "0.75", "0.50")


def test_a_server_that_failed_is_in_the_table_with_the_reason() -> None:
    results = Results()
    results.failures["W0", MOSEC] = "does not start"

    row = cells(results, MOSEC)["Mosec", "2"]

    assert row["Requests/s"] == "does not start"


def test_what_was_measured_before_a_server_failed_does_not_count() -> None:
    results = Results()
    results.add("W0", MOSEC, 32, measured(100.0))
    results.failures["W0", MOSEC] = "answers wrongly"

    assert results.median("W0", MOSEC, 32) is None


@pytest.mark.parametrize(
    ("answer", "expected", "tolerance", "agreed"),
    [
        pytest.param([1.0, 2.0], [1.0, 2.0], 0.0, True, id="equal"),
        pytest.param([1.0, 2.000001], [1.0, 2.0], 1e-5, True, id="near"),
        pytest.param([1.0, 2.000001], [1.0, 2.0], 0.0, False, id="near, where equality is asked for"),
        pytest.param([1.0], [1.0, 2.0], 1e-5, False, id="shorter"),
        pytest.param({"error": "no"}, [1.0], 1e-5, False, id="another kind"),
        pytest.param([float("nan")], [1.0], 1e-5, False, id="not a number"),
        pytest.param("text", "text", 0.0, True, id="text"),
    ],
)
def test_answers_agree_within_the_tolerance(answer: object, expected: object, tolerance: float, agreed: bool) -> None:
    assert agree(answer, expected, tolerance) is agreed


@pytest.mark.parametrize(
    ("shares", "warned"),
    [pytest.param([0.0, 0.01, 0.6], False, id="one disturbance"), pytest.param([0.0, 0.2, 0.3], True, id="busy")],
)
def test_a_machine_that_was_busy_most_of_the_time_is_warned_of(shares: list[float], warned: bool) -> None:
    assert ("not idle" in warning(shares)) is warned


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_every_run_sends_the_same_requests(workload: type[MeanColour]) -> None:
    assert workload.bodies() == workload.bodies()


def test_the_picture_has_the_stated_size() -> None:
    data = jpeg(1280, 960, 200_000, seed=0)

    assert Image.open(io.BytesIO(data)).size == (1280, 960)
    assert 180_000 < len(data) < 220_000


def test_the_mean_of_a_picture_of_one_colour_is_that_colour() -> None:
    assert MeanColour()([Image.new("RGB", (320, 240), (10, 20, 30))]) == [[10.0, 20.0, 30.0]]


@pytest.mark.parametrize("name", SERVERS)
def test_every_server_has_a_script_and_pinned_requirements(name: str) -> None:
    installed_as = SERVERS[name].installed_as or name
    requirements = (BENCHMARKS / "requirements" / f"{installed_as}.txt").read_text().splitlines()

    unpinned = [line for line in requirements if line and not re.match(r"#|-e \./|[\w\[\]-]+==[\d.]+$", line)]

    assert (BENCHMARKS / "peers" / f"{name}.py").is_file()
    assert not unpinned


def test_fewer_processes_than_this_server_has_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--processes", "1"])

    assert "at least 2" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--connections", "--seconds", "--rounds"])
def test_a_run_that_would_measure_nothing_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([option, "0"])

    assert f"{option}: at least 1" in capsys.readouterr().err


def test_wrk_is_refused_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)

    with pytest.raises(SystemExit):
        parse(["--generator", "wrk"])

    assert "wrk is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(("workload", "warned"), [("W0", True), ("W2", False)])
def test_the_generator_in_python_is_warned_of_where_it_takes_too_much(workload: str, warned: bool) -> None:
    lines = machine(Benchmark(parse(["--generator", "python", "--workloads", workload])))

    assert any("do not count" in line for line in lines) is warned


Run = Callable[[Benchmark], None]


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Run], Path]:
    """Runs the script with something else in place of its measuring; gives the file of the results, there before."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    output = tmp_path / "RESULTS.md"
    output.write_text("of another run")

    def run(measuring: Run, workload: str = "W0") -> Path:
        monkeypatch.setattr(Benchmark, "run", measuring)
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            bench.main(["--workloads", workload, "--output", str(output)])
        assert list(tmp_path.iterdir()) == [output]
        return output

    return run


def test_a_run_that_measured_nothing_leaves_the_results_there_were(run_main: Callable[..., Path]) -> None:
    def interrupted(_: Benchmark) -> None:
        raise KeyboardInterrupt

    assert run_main(interrupted).read_text() == "of another run"


def test_an_interrupted_run_writes_what_it_measured_and_says_so(run_main: Callable[..., Path]) -> None:
    def interrupted(benchmark: Benchmark) -> None:
        benchmark.note("W0", DIRECT, 1, measured(123.0))
        raise KeyboardInterrupt

    text = run_main(interrupted).read_text()

    assert "| 123 |" in text
    assert "**interrupted**: medians of up to 1 of 3 rounds" in text


def test_a_run_leaves_what_the_file_has_of_other_workloads(run_main: Callable[..., Path]) -> None:
    rates = iter([111.0, 222.0, 333.0])

    def interrupted(benchmark: Benchmark) -> None:
        benchmark.note(benchmark.options.workloads[0], DIRECT, 1, measured(next(rates)))
        raise KeyboardInterrupt

    for workload in ("W1", "W0", "W1"):
        text = run_main(interrupted, workload).read_text()

    assert re.findall(r"^#+ \w+", text, re.MULTILINE) == ["# Results", "## W0", "## W1"]
    assert "| 111 |" not in text
    assert text.index("| 222 |") < text.index("## W1") < text.index("| 333 |")
    assert text.count("this server at commit") == 2


def test_a_run_in_which_a_server_failed_ends_with_an_error(run_main: Callable[..., Path]) -> None:
    def failing(benchmark: Benchmark) -> None:
        benchmark.note("W0", DIRECT, 1, measured(123.0))
        benchmark.results.failures["W0", Contender("mosec", 2)] = "does not start"
        benchmark.complete = True

    text = run_main(failing).read_text()

    assert "medians of 3 rounds" in text
    assert "interrupted" not in text


@pytest.mark.parametrize(("left", "made"), [("python", True), ("pip", False)])
def test_an_environment_without_pip_is_made_anew(
    left: str, made: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "flask"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / left).touch()
    options: list[dict[str, Any]] = []
    monkeypatch.setattr(venv, "create", lambda _, **more: options.append(more))
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, stderr="no"))
    monkeypatch.setattr(bench, "venv_of", lambda _: folder)

    with pytest.raises(Failed):
        install("flask")

    assert options == [{"with_pip": True, "clear": True}] * made


def test_what_a_server_left_when_it_ended_by_itself_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CHILDREN_STOP_TIMEOUT_S", 0.1)
    start_another = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'input()'], stdin=0).pid)"
    left_alone = subprocess.Popen(
        [sys.executable, "-c", start_another],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with left_alone:
        assert left_alone.stdout is not None
        child = psutil.Process(int(left_alone.stdout.readline()))
        left_alone.wait()

        stop(left_alone)

        assert not is_running(child)


def test_a_process_that_has_ended_counts_for_no_time() -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.DEVNULL) as process:
        seen = psutil.Process(process.pid)

    assert used_s([seen]) == 0


class Echo(http.server.BaseHTTPRequestHandler):
    """Answers a request with its body, or with 500 if that is ``"bad"``; notes what came."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet an answer: a second one would wait for the client's word on the first
    bodies: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.bodies.append(body.decode())
        self.send_response(500 if json.loads(body) == "bad" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = False  # so that closing it waits for them

    def handle_error(self, *_: object) -> None:
        pass  # a generator leaves when its time is up, whatever is on its way


@pytest.fixture
def serve() -> Iterator[Callable[[type[Echo]], str]]:
    """Starts servers; gives the address of each."""
    servers: list[tuple[Server, threading.Thread]] = []

    def start(handler: type[Echo]) -> str:
        server = Server(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/predict"

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def echo(serve: Callable[[type[Echo]], str]) -> tuple[str, list[str]]:
    """The address of an echoing server, and the bodies that it receives."""
    bodies: list[str] = []
    return serve(type("Handler", (Echo,), {"bodies": bodies})), bodies


GENERATORS = sorted({"python", choose_generator()})


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_generator_sends_all_bodies_in_turn(generator: str, echo: tuple[str, list[str]]) -> None:
    url, received = echo

    result = measure(generator, url, ['"one"', '"two"'], connections=1, seconds=0.3)

    assert set(received[:2]) == set(received[2:4]) == {'"one"', '"two"'}
    assert result.n_errors == 0
    assert result.requests_per_s > 0
    assert 0 < result.p50_ms <= result.p99_ms


@pytest.mark.parametrize("generator", GENERATORS)
def test_an_answer_with_an_error_status_counts_as_an_error(generator: str, echo: tuple[str, list[str]]) -> None:
    url, _ = echo

    result = measure(generator, url, ['"bad"'], connections=2, seconds=0.3)

    assert result.n_errors > 0
    assert result.requests_per_s == 0
    assert 0 < result.p50_ms <= result.p99_ms


@pytest.mark.parametrize("generator", GENERATORS)
def test_latencies_are_those_of_answers_that_came(generator: str, serve: Callable[[type[Echo]], str]) -> None:
    slow_s, numbers = 0.5, itertools.count(1)

    class SlowNowAndThen(Echo):
        bodies: list[str] = []

        def do_POST(self) -> None:
            time.sleep(slow_s if next(numbers) % 200 == 0 else 0.002)
            super().do_POST()

    # wrk itself takes it that during each slow answer there were to be many others, nearly as slow.
    result = measure(generator, serve(SlowNowAndThen), ['"one"'], connections=4, seconds=1.5)

    assert next(numbers) > 200, "none was slow"
    assert result.p99_ms < 1e3 * slow_s / 2


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_connection_that_the_server_says_it_closes_is_no_error(
    generator: str, serve: Callable[[type[Echo]], str]
) -> None:
    class Closing(Echo):
        bodies: list[str] = []

        def end_headers(self) -> None:
            self.send_header("Connection", "close")
            super().end_headers()

    result = measure(generator, serve(Closing), ['"one"', '"two"'], connections=2, seconds=0.3)

    assert len(Closing.bodies) > 4
    assert result.n_errors == 0
    assert result.requests_per_s > 0


def test_an_answer_that_is_not_http_counts_as_an_error(serve: Callable[[type[Echo]], str]) -> None:
    class Muttering(Echo):
        bodies: list[str] = []

        def do_POST(self) -> None:
            self.bodies.append("")
            self.wfile.write(b"hm\r\n\r\n")
            self.close_connection = True

    result = measure("python", serve(Muttering), ['"one"'], connections=1, seconds=0.3)

    assert result.n_errors >= len(Muttering.bodies) - 1 > 0


def test_a_connection_that_never_had_an_answer_counts_as_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/predict"

        result = measure("python", url, ['"one"'], connections=3, seconds=0.3)

    assert result == Measurement(requests_per_s=0, p50_ms=0, p99_ms=0, n_errors=3)


def test_the_readme_tells_of_every_server_and_every_workload() -> None:
    text = (BENCHMARKS / "README.md").read_text()

    missing = [
        word for word in (*WORKLOADS, *(server.title.strip("*") for server in SERVERS.values())) if word not in text
    ]

    assert not missing
