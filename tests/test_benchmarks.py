"""The benchmark script's own arithmetic and set-up. What it measures is not tested here."""

from __future__ import annotations

import http.server
import io
import json
import re
import threading
from collections.abc import Iterator

import pytest
from PIL import Image

from benchmarks.bench import (
    BENCHMARKS,
    DIRECT,
    SERVERS,
    Benchmark,
    Contender,
    Results,
    agree,
    contenders,
    parse,
    table,
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


class Echo(http.server.BaseHTTPRequestHandler):
    """Answers a request with its body, or with 500 if that is ``"bad"``; notes what came."""

    protocol_version = "HTTP/1.1"
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


@pytest.fixture
def echo() -> Iterator[tuple[str, list[str]]]:
    """The address of an echoing server, and the bodies that it receives."""
    bodies: list[str] = []
    handler = type("Handler", (Echo,), {"bodies": bodies})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/predict", bodies
        server.shutdown()
        thread.join()


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


def test_the_readme_tells_of_every_server_and_every_workload() -> None:
    text = (BENCHMARKS / "README.md").read_text()

    missing = [
        word for word in (*WORKLOADS, *(server.title.strip("*") for server in SERVERS.values())) if word not in text
    ]

    assert not missing
