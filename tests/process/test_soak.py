"""The soak test's script, run for seconds; ``make soak`` runs it for minutes. And that of the overload, interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks import soak
from benchmarks.bench import family, kill
from benchmarks.soak import Record, Request, report
from dev_server import ROOT
from tests.conftest import server_environment
from tests.waiting import wait_until

ONE = Request("fake_echo", "{}", "40x9", frozenset({"200", "503 model_unavailable"}))


def record_of(growth_a_sample: float) -> Record:
    samples = [{("engine", "MiB"): 40 + growth_a_sample * index} for index in range(100)]
    return Record(samples=samples)


@pytest.mark.process
def test_a_short_soak_finds_nothing_wrong(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--minutes", "0.06"]

    done = subprocess.run(
        command, cwd=tmp_path, env=server_environment(tmp_path), capture_output=True, text=True, timeout=120
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "violations: 0" in done.stdout


def runs(script: psutil.Process, part: str) -> bool:
    """Tell whether a script has started a process with this in its command line."""
    for child in script.children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if part in " ".join(child.cmdline()):
                return True
    return False


@pytest.mark.process
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)])
@pytest.mark.parametrize(
    ("script", "under_load"),
    [("soak.py --minutes 5", "core.model_process"), ("overload.py --seconds 300 --connections 9", "--load")],
    ids=["soak", "overload"],
)
def test_interrupted_script_leaves_no_process_behind(
    tmp_path: Path, script: str, under_load: str, sent: signal.Signals, status: int
) -> None:
    name, *options = script.split()
    command = [sys.executable, str(ROOT / "benchmarks" / name), *options]
    with subprocess.Popen(
        command, cwd=tmp_path, env=server_environment(tmp_path), stderr=subprocess.DEVNULL
    ) as started:
        process = psutil.Process(started.pid)
        processes = [process]
        try:
            wait_until(lambda: runs(process, under_load), "the load")
            processes = family(process)

            started.send_signal(sent)

            assert started.wait(60) == status
            assert psutil.wait_procs(processes, timeout=30)[1] == []
        finally:
            kill(processes)


@contextmanager
def server_of_one_answer(status: int, body: bytes, ended: threading.Event) -> Iterator[str]:
    """Answer one request, and set ``ended``; the address is returned."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            ended.set()
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        thread.join()


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b"null"), (200, b"[null]"), (200, b"[]"), (200, b"no JSON"), (500, b"{}"), (500, b"[]")],
)
def test_answer_of_no_known_form_is_a_violation(status: int, body: bytes) -> None:
    record, ended = Record(), threading.Event()

    with server_of_one_answer(status, body, ended) as address:
        soak.send(address, [ONE], record, ended, seed=0)

    (violation,) = record.violations
    assert violation.startswith("fake_echo '40x9': wrong answer: ")


def test_model_that_never_gives_a_right_answer_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "CLIENT_TIMEOUT_S", 0.0)
    record = Record()
    record.add(ONE, "503 model_unavailable")

    soak.wait_until_all_answered(record, ["fake_echo"])

    assert record.violations == ["fake_echo gave no right answer within 0 s"]


@pytest.mark.parametrize(("last_s", "n_violations"), [(1e6, 0), (0, 1)], ids=["since", "before"])
def test_model_that_gives_no_right_answer_any_more_is_a_violation(last_s: float, n_violations: int) -> None:
    record = Record()
    record.add(ONE, "200")

    soak.note_silent_models(record, ["fake_echo"], last_s)

    assert len(record.violations) == n_violations


def test_process_that_is_replaced_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = psutil.Process(), psutil.Process(os.getppid())
    looks = iter([{"master": one, "engine": one}, {"master": one, "engine": other}])
    monkeypatch.setattr(soak, "processes_of", lambda _: next(looks))
    record, ended = Record(), threading.Event()
    ended.set()

    soak.sample(one, record, ended)

    assert record.violations == [f"the engine ended (process {one.pid})"]


def test_what_an_engine_starts_is_not_taken_for_the_engine() -> None:
    engine = SimpleNamespace(pid=2, cmdline=lambda: ["python", "-m", "core.engine_process"], ppid=lambda: 1)
    forked = SimpleNamespace(pid=3, cmdline=engine.cmdline, ppid=lambda: 2)
    master: Any = SimpleNamespace(pid=1, children=lambda recursive: [engine, forked])

    found: dict[str, Any] = soak.processes_of(master)

    assert found == {"master": master, "engine": engine}


def test_thread_that_fails_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    def answer_all(address: str, requests: list[Request], record: Record, *_: Any) -> None:
        for request in requests:
            if "200" in request.outcomes:
                record.add(request, "200")

    monkeypatch.setattr(soak, "send", answer_all)
    monkeypatch.setattr(soak, "operate", lambda *_: None)
    monkeypatch.setattr(soak, "sample", fail)
    record = Record()

    soak.put_under_load("", psutil.Process(), record, minutes=0, n_clients=1)

    assert record.violations == ["a thread ended with ZeroDivisionError()"]


@pytest.mark.parametrize(("growth", "n_violations"), [(0.1, 0), (1.0, 1)], ids=["slow", "fast"])
def test_growth_beyond_what_is_allowed_is_a_violation(growth: float, n_violations: int) -> None:
    record = record_of(growth)

    text = report(record, minutes=1)

    assert len(record.violations) == n_violations
    assert f"violations: {n_violations}" in text


@pytest.mark.parametrize(
    ("outcome", "n_violations"),
    [
        ("200", 0),
        ("503 model_unavailable", 0),
        ("500 model_error", 1),
        ("wrong answer: 41x9", 1),
        ("lost: ConnectionResetError", 1),
    ],
)
def test_outcome_that_nothing_accounts_for_is_a_violation(outcome: str, n_violations: int) -> None:
    record = Record()

    record.add(ONE, outcome)

    assert len(record.violations) == n_violations
