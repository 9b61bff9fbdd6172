"""Measure this server and its peers side by side on this machine, and write the tables to benchmarks/RESULTS.md.

    python benchmarks/bench.py
    python benchmarks/bench.py --workloads W0 --servers ours flask mosec --seconds 2 --rounds 1

README.md beside this file says what is compared with what.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, Final
from urllib.parse import urlsplit

import psutil

ROOT: Final = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.load import TIMEOUT_S, Measurement, choose_generator, measure  # noqa: E402 - the path is set above
from benchmarks.workloads import MAX_BATCH_SIZE, WORKLOADS, Workload  # noqa: E402

BENCHMARKS: Final = ROOT / "benchmarks"
START_TIMEOUT_S: Final = 180
STOP_TIMEOUT_S: Final = 30
#: After their parent has ended. Some servers leave processes that do not.
CHILDREN_STOP_TIMEOUT_S: Final = 1
MAX_WARM_UP_S: Final = 3.0
#: A measurement takes longer than it was asked to where the model is too slow to answer each connection this often.
LEAST_ANSWERS: Final = 2
#: Or to run so many batches: the answers of a batch come at once, and one more or less must not show.
LEAST_BATCHES: Final = 8
MAX_DRAIN_S: Final = 60.0
DRAIN_CHECK_S: Final = 0.25
#: A server that uses less of one core than this is idle: some have clocks of their own.
IDLE_USE: Final = 0.2
#: Above this share of the machine that others use, the numbers are not to be trusted.
MAX_OTHER_WORK: Final = 0.05


@dataclass(frozen=True)
class Server:
    """What tells one server from another, to those who ask it."""

    title: str
    path: str = "/predict"
    #: Whether a request is a list of items and its answer a list of results.
    takes_list: bool = False
    #: Whose environment it uses; None: its own.
    installed_as: str | None = None
    #: The workloads that it takes part in, each with how far its answers may be off; None: all, as far as theirs say.
    tolerances: Mapping[str, float] | None = None


SERVERS: Final = {
    "ours": Server("**this server**", path="/api/tasks/{task}/models/{model}/features"),
    "ours_draft": Server(
        "**this server, drafts**",
        path="/api/tasks/{task}/models/{model}/features",
        installed_as="ours",
        tolerances={"W1": 0.1, "W3": 0.01},
    ),
    "flask": Server("bare Flask"),
    "litserve": Server("LitServe"),
    "bentoml": Server("BentoML", takes_list=True),
    "mosec": Server("Mosec"),
    "ray": Server("Ray Serve"),
}


@dataclass(frozen=True)
class Contender:
    """A server with a number of processes, or (``direct``) the model without any."""

    name: str
    n_processes: int

    @property
    def title(self) -> str:
        return "direct calls" if self.name == "direct" else SERVERS[self.name].title


DIRECT: Final = Contender("direct", 1)


def tolerance_of(contender: Contender, workload: str) -> float | None:
    """Return how far a contender's answers may be off; None if it does not take part in the workload."""
    own = None if contender == DIRECT else SERVERS[contender.name].tolerances
    return WORKLOADS[workload].tolerance if own is None else own.get(workload)


class Failed(Exception):
    """A server could not be installed, started or measured, or answered wrongly."""


@dataclass
class Results:
    """What was measured: a list of rounds for every workload, contender and number of connections."""

    measurements: dict[tuple[str, Contender, int], list[Measurement]] = field(default_factory=dict)
    failures: dict[tuple[str, Contender], str] = field(default_factory=dict)
    memory_mb: dict[tuple[str, Contender], list[float]] = field(default_factory=dict)
    #: The share of the machine that was in use while no server ran.
    other_work: list[float] = field(default_factory=list)
    #: The share of it that neither the server nor the generator used while one was measured.
    other_work_during: list[float] = field(default_factory=list)

    def add(self, workload: str, contender: Contender, connections: int, measurement: Measurement) -> None:
        self.measurements.setdefault((workload, contender, connections), []).append(measurement)

    def median(self, workload: str, contender: Contender, connections: int) -> Measurement | None:
        """Return the rounds' medians, each number by itself, and the sum of all errors."""
        rounds = self.measurements.get((workload, contender, connections))
        if not rounds or (workload, contender) in self.failures:
            return None
        return Measurement(
            median(one.requests_per_s for one in rounds),
            median(one.p50_ms for one in rounds),
            median(one.p99_ms for one in rounds),
            sum(one.n_errors for one in rounds),
        )


def contenders(names: Sequence[str], processes: Sequence[int]) -> list[Contender]:
    """Return who takes part: every server with every number of processes.

    Bare Flask also runs with as many workers as this server has web workers: one less, for the engine.
    """
    found = []
    for n_processes in processes:
        for name in names:
            if name == "flask":
                found.append(Contender(name, n_processes - 1))
            found.append(Contender(name, n_processes))
    return list(dict.fromkeys(found))


# Environments


def install(name: str) -> None:
    """Make the virtual environment of one server, or bring it up to date.

    Raises:
        Failed: what the server needs could not be installed.
    """
    folder = venv_of(name)
    name = folder.name
    requirements = BENCHMARKS / "requirements" / f"{name}.txt"
    needed = requirements.read_bytes()
    if name == "ours":
        needed += (ROOT / "feature_extraction_server-core" / "pyproject.toml").read_bytes()
    fingerprint = hashlib.sha256(needed).hexdigest()
    stamp = folder / "installed"
    if stamp.exists() and stamp.read_text() == fingerprint:
        return
    say(f"installing {name}")
    if not (folder / "bin" / "pip").exists():  # which comes last: where it is missing, this was interrupted before
        venv.create(folder, with_pip=True, clear=True)
    python = str(folder / "bin" / "python")
    get_uv = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"]
    for command in (get_uv, [python, ".ci/install.py", "-r", str(requirements)]):
        finished = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        if finished.returncode:
            raise Failed(f"cannot be installed: {last_line(finished.stderr)}")
    stamp.write_text(fingerprint)


def python_of(name: str) -> str:
    """Return the interpreter of a server's virtual environment."""
    return str(venv_of(name) / "bin" / "python")


def venv_of(name: str) -> Path:
    return BENCHMARKS / ".venvs" / (SERVERS[name].installed_as or name)


def environment(folder: Path) -> dict[str, str]:
    """Return the environment that every server gets."""
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    own = {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    return inherited | own | {"LOG_PATH": str(folder / "log.txt"), "TMPDIR": str(folder)}


# Servers


class Running:
    """A server that answers: where, and how it is asked."""

    def __init__(self, contender: Contender, workload: type[Workload], port: int, process: psutil.Process) -> None:
        self._server = SERVERS[contender.name]
        path = self._server.path.format(task=workload.task, model=workload.model)
        self.url = f"http://127.0.0.1:{port}{path}"
        self.bodies = [json.dumps([body] if self._server.takes_list else body) for body in workload.bodies()]
        if self._server.takes_list:
            self.bodies = [f'{{"items": {body}}}' for body in self.bodies]
        self._process = process

    def ask(self, body: str) -> Any:
        """Return the answer to one body.

        Raises:
            OSError: there is no answer.
            Failed: it is an error.
        """
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.netloc, timeout=TIMEOUT_S)
        try:
            connection.request("POST", parts.path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise Failed(f"answers {response.status}: {data[:200].decode(errors='replace')}")
        answer = json.loads(data)
        return answer[0] if self._server.takes_list else answer

    def wait_until_idle(self) -> None:
        """Wait until what a generator left unanswered when its time was up is done with."""
        self.ask(self.bodies[0])  # waits in the same queue, behind it
        give_up_at = time.monotonic() + MAX_DRAIN_S
        before_s = self.cpu_s()
        while time.monotonic() < give_up_at:
            time.sleep(DRAIN_CHECK_S)
            now_s = self.cpu_s()
            if now_s - before_s < IDLE_USE * DRAIN_CHECK_S:
                return
            before_s = now_s

    def cpu_s(self) -> float:
        """Return the time that its processes have used of the cores."""
        return used_s(family(self._process))

    def memory_mb(self) -> float:
        """Return the memory of all processes; what they share counts once."""
        n_bytes = 0
        for process in family(self._process):
            with suppress(psutil.Error):
                memory = process.memory_full_info()
                n_bytes += getattr(memory, "pss", memory.rss)
        return n_bytes / 1e6


@contextmanager
def running(contender: Contender, workload_name: str) -> Iterator[Running]:
    """Start a server and wait until it answers; end it and all its processes afterwards.

    Raises:
        Failed: it does not start, or answers with errors.
    """
    # Short, since some servers make Unix sockets in it.
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    port = free_port()
    arguments = [str(port), workload_name, str(contender.n_processes)]
    command = [python_of(contender.name), "-m", f"benchmarks.peers.{contender.name}", *arguments]
    log = folder / "server.log"
    with log.open("wb") as file:
        started = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(folder),
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # by which stop() finds what is left of it
        )
    try:
        process = psutil.Process(started.pid)
        server = Running(contender, WORKLOADS[workload_name], port, process)
        wait_until_ready(server, started, log)
        yield server
    finally:
        stop(started)
        shutil.rmtree(folder, ignore_errors=True)


def wait_until_ready(server: Running, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up_at = time.monotonic() + START_TIMEOUT_S
    reason = "gave no answer"
    while time.monotonic() < give_up_at and process.poll() is None:
        try:
            server.ask(server.bodies[0])
            return
        except (OSError, http.client.HTTPException):
            pass
        except Failed as failure:  # some servers listen before their workers are there
            reason = str(failure)
        time.sleep(0.1)
    if process.poll() is not None:
        reason = f"ended with status {process.poll()}"
    raise Failed(f"does not start: {reason} ({last_line(log.read_text(errors='replace'))})")


def stop(started: subprocess.Popen[bytes]) -> None:
    """End a server as an operator does, and whatever of it is left then."""
    processes = all_of(started)
    try:
        started.terminate()
        with suppress(subprocess.TimeoutExpired):
            started.wait(STOP_TIMEOUT_S)
        wait_until_ended(processes)
    finally:  # of an impatient operator as well
        processes = list({*processes, *all_of(started)})
        # Those that remove the others' semaphores end by themselves once the others are gone.
        trackers = [process for process in processes if has_argument(process, "resource_tracker")]
        kill([process for process in processes if process not in trackers])
        wait_until_ended(trackers)
        kill(trackers)
        started.wait()


def has_argument(process: psutil.Process, part: str) -> bool:
    """Tell whether a process was started with an argument that holds a text; one that has ended was not."""
    try:
        return any(part in argument for argument in process.cmdline())
    except psutil.Error:
        return False


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):  # it has ended
            process.kill()
    wait_until_ended(processes)


def wait_until_ended(processes: list[psutil.Process]) -> None:
    """Wait for processes, but not for who has to take note of their end: that may take a second or two."""
    give_up_at = time.monotonic() + CHILDREN_STOP_TIMEOUT_S
    while any(map(is_running, processes)) and time.monotonic() < give_up_at:
        time.sleep(0.01)


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def all_of(started: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return what is there of a process and all that it has started.

    If it leads a session, what it left there when it ended is found as well.
    """
    members = [process for process in psutil.process_iter() if session_of(process) == started.pid]
    if started.poll() is None:
        members += family(psutil.Process(started.pid))
    return list(set(members))


def session_of(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:  # it has ended
        return None


def family(process: psutil.Process) -> list[psutil.Process]:
    """Return a process and all that it and its children have started."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def used_s(processes: Sequence[psutil.Process]) -> float:
    """Return the time that processes have used of the cores; one that has ended counts for nothing."""
    seconds = 0.0
    for process in processes:
        with suppress(psutil.Error):
            times = process.cpu_times()
            seconds += times.user + times.system
    return seconds


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# Measuring


def check_answers(server: Running, expected: list[Any], tolerance: float) -> None:
    """Ask everything, many at a time, and compare with what direct calls gave.

    Raises:
        Failed: an answer differs by more than ``tolerance``.
    """
    with ThreadPoolExecutor(16) as pool:
        n_requests = max(MAX_BATCH_SIZE, len(server.bodies))
        answers = list(pool.map(server.ask, islice(cycle(server.bodies), n_requests)))
    for index, answer in enumerate(answers):
        if not agree(answer, expected[index % len(expected)], tolerance):
            raise Failed(f"answers wrongly: {json.dumps(answer)[:100]}")


def agree(answer: Any, expected: Any, tolerance: float) -> bool:
    """Tell whether two JSON values are equal, numbers to within ``tolerance``."""
    if isinstance(answer, list) and isinstance(expected, list):
        return len(answer) == len(expected) and all(
            agree(one, other, tolerance) for one, other in zip(answer, expected, strict=True)
        )
    if isinstance(answer, float) and isinstance(expected, float):
        return abs(answer - expected) <= tolerance
    return bool(answer == expected)


class Benchmark:
    """One run over some workloads and contenders."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.contenders = contenders(options.servers, options.processes)
        self.results = Results()
        self.expected: dict[str, list[Any]] = {}
        self.began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        self.load_before = os.getloadavg()
        self.cannot_be_installed: dict[str, str] = {}
        self.complete = False

    def run(self) -> None:
        """Measure all. What fails is kept as such, and is not tried again in later rounds."""
        for name in dict.fromkeys(["ours", *self.options.servers]):  # direct calls use our environment
            try:
                install(name)
            except Failed as failure:
                self.cannot_be_installed[name] = str(failure)
        for workload in self.options.workloads:
            for index in range(self.options.rounds):
                if not (due := self.due(workload, index)):
                    break
                say(f"{workload}, round {index + 1} of {self.options.rounds}")
                self.measure_direct_calls(workload, due)
                for contender in self.contenders:
                    self.measure_server(workload, contender, due)
        self.complete = True

    def due(self, workload: str, n_rounds: int) -> list[int]:
        """Return the numbers of connections with which to measure once more, after so many rounds.

        Where the model is so slow that one round takes as long as all of them were to, there is one.
        """
        if not n_rounds:
            return list(self.options.connections)
        all_s = self.options.rounds * self.options.seconds
        return [one for one in self.options.connections if n_rounds * self.seconds(workload, one) < all_s]

    def measure_direct_calls(self, workload: str, numbers_of_connections: Sequence[int]) -> None:
        self.note_other_work()
        arguments = [workload, str(self.options.seconds), *map(str, numbers_of_connections)]
        command = [python_of("ours"), "-m", "benchmarks.peers.direct", *arguments]
        with tempfile.TemporaryFile("w+") as log:
            environ = environment(Path(tempfile.gettempdir()))
            finished = subprocess.run(command, env=environ, stdout=subprocess.PIPE, stderr=log)
            log.seek(0)
            if finished.returncode:
                raise SystemExit(f"direct calls for {workload} failed:\n{log.read()}")
        answer = json.loads(finished.stdout)
        self.expected[workload] = answer["answers"]
        for connections, measured in zip(numbers_of_connections, answer["measurements"], strict=True):
            self.note(workload, DIRECT, connections, Measurement(**measured))

    def measure_server(self, workload: str, contender: Contender, numbers_of_connections: Sequence[int]) -> None:
        tolerance = tolerance_of(contender, workload)
        if tolerance is None or (workload, contender) in self.results.failures:
            return
        try:
            if contender.name in self.cannot_be_installed:
                raise Failed(self.cannot_be_installed[contender.name])
            self.note_other_work()
            with running(contender, workload) as server:
                check_answers(server, self.expected[workload], tolerance)
                warm_up_s = min(MAX_WARM_UP_S, self.options.seconds)
                self.load(server, max(numbers_of_connections), warm_up_s)
                for connections in numbers_of_connections:
                    measured = self.load(server, connections, self.seconds(workload, connections))
                    self.note(workload, contender, connections, measured)
                self.results.memory_mb.setdefault((workload, contender), []).append(server.memory_mb())
        except (Failed, OSError, http.client.HTTPException, subprocess.CalledProcessError) as failure:
            self.results.failures[workload, contender] = str(failure) or type(failure).__name__
            say(f"  {label(contender)}: {failure}")

    def seconds(self, workload: str, connections: int) -> float:
        """Return how long to measure: the first answers of all connections come at once, and tell little."""
        direct = self.results.measurements[workload, DIRECT, connections][-1]
        least_requests = max(LEAST_ANSWERS * connections, LEAST_BATCHES * min(connections, MAX_BATCH_SIZE))
        asked_s: float = self.options.seconds
        return max(asked_s, least_requests / direct.requests_per_s)

    def load(self, server: Running, connections: int, seconds: float) -> Measurement:
        server.wait_until_idle()
        begun, all_s, own_s = time.monotonic(), busy_s(), server.cpu_s() + generators_s()
        measured = measure(self.options.generator, server.url, server.bodies, connections, seconds)
        other_s = busy_s() - all_s - (server.cpu_s() + generators_s() - own_s)
        self.results.other_work_during.append(max(0.0, other_s / (time.monotonic() - begun) / (os.cpu_count() or 1)))
        return measured

    def note(self, workload: str, contender: Contender, connections: int, measured: Measurement) -> None:
        self.results.add(workload, contender, connections, measured)
        say(
            f"  {label(contender):32} {connections:4} connections {measured.requests_per_s:9.1f}/s"
            f"  {measured.p50_ms:9.2f} ms  {measured.p99_ms:9.2f} ms (99 %)  {measured.n_errors} errors"
        )

    def note_other_work(self) -> None:
        self.results.other_work.append(psutil.cpu_percent(interval=0.5) / 100)


def busy_s() -> float:
    """Return the time that the machine's cores have been busy."""
    times = psutil.cpu_times()
    return float(sum(times[:8]) - times.idle - getattr(times, "iowait", 0.0))


def generators_s() -> float:
    """Return the time that the generators have used of the cores, those that have ended."""
    times = os.times()
    return times.children_user + times.children_system


# The report


HEADER: Final = (
    "Server",
    "Processes",
    "Requests/s",
    "x bare Flask",
    "x best peer",
    "x direct",
    "Median ms",
    "99 % ms",
    "Errors",
    "Memory MB",
)


def table(results: Results, workload: str, connections: int, taking_part: Sequence[Contender]) -> list[str]:
    """Return the lines of one table: a row a contender, the fastest first, those that failed last."""
    rows = []
    for contender in taking_part:
        measured = results.median(workload, contender, connections)
        if measured is None:
            reason = results.failures.get((workload, contender), "not measured").replace("|", "/")
            row = [contender.title, str(contender.n_processes), reason, *[""] * (len(HEADER) - 3)]
        else:
            row = measured_row(results, workload, contender, connections, taking_part, measured)
        rows.append((measured.requests_per_s if measured else -1.0, row))
    rows.sort(key=lambda row: -row[0])
    rule = ["---", *["---:"] * (len(HEADER) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (HEADER, rule, *(row for _, row in rows))]


def measured_row(
    results: Results,
    workload: str,
    contender: Contender,
    connections: int,
    taking_part: Sequence[Contender],
    measured: Measurement,
) -> list[str]:
    """Return the cells of a contender that was measured."""
    memory = results.memory_mb.get((workload, contender))
    direct = results.median(workload, DIRECT, connections)
    return [
        contender.title if contender != DIRECT else f"direct calls, {min(connections, MAX_BATCH_SIZE)} at a time",
        str(contender.n_processes),
        f"{measured.requests_per_s:,.{1 if measured.requests_per_s < 100 else 0}f}",
        ratio(measured, flask_beside(results, workload, contender, connections)),
        ratio(measured, best_peer(results, workload, contender, connections, taking_part)),
        ratio(measured, direct),
        f"{measured.p50_ms:,.2f}" if measured.requests_per_s else "",
        f"{measured.p99_ms:,.2f}" if measured.requests_per_s else "",
        str(measured.n_errors),
        f"{max(memory):,.0f}" if memory else "",
    ]


def ratio(measured: Measurement, other: Measurement | None) -> str:
    return f"{measured.requests_per_s / other.requests_per_s:.2f}" if other and other.requests_per_s else ""


def flask_beside(results: Results, workload: str, contender: Contender, connections: int) -> Measurement | None:
    """Return bare Flask with one worker for each web worker of this server at the contender's number of processes."""
    if contender.name in ("direct", "flask"):
        return None
    return results.median(workload, Contender("flask", contender.n_processes - 1), connections)


def best_peer(
    results: Results, workload: str, contender: Contender, connections: int, taking_part: Sequence[Contender]
) -> Measurement | None:
    """Return the fastest of the peers with as many processes as the contender; None where there is only itself."""
    n_processes = contender.n_processes
    equals = [one for one in taking_part if one.n_processes == n_processes and one != DIRECT]
    if contender == DIRECT or equals == [contender]:
        return None
    measured = [results.median(workload, peer, connections) for peer in equals if not peer.name.startswith("ours")]
    return max((one for one in measured if one), key=lambda one: one.requests_per_s, default=None)


def report(benchmark: Benchmark, before: str) -> str:
    """Return RESULTS.md: what was measured and, from the file as it was before, what was not measured this time."""
    sections = sections_of(before)
    for workload in benchmark.options.workloads:
        if (workload, DIRECT, benchmark.options.connections[0]) in benchmark.results.measurements:  # not interrupted
            sections[workload] = section(benchmark, workload)
    head = (
        "# Results",
        "",
        "Written by `benchmarks/bench.py`; `README.md` beside this file says how to read it. The numbers of a workload",
        "are those of the last run that measured it.",
        "",
    )
    return "\n".join([*head, *(sections[workload] for workload in WORKLOADS if workload in sections)])


def sections_of(text: str) -> dict[str, str]:
    """Return what a RESULTS.md has of each workload."""
    parts = re.split(r"^(?=## \w+:)", text, flags=re.MULTILINE)[1:]
    return {part[3:].partition(":")[0]: part for part in parts}


def section(benchmark: Benchmark, workload: str) -> str:
    lines = [f"## {workload}: {WORKLOADS[workload].description}", "", *machine(benchmark), ""]
    everybody = [DIRECT, *benchmark.contenders]
    taking_part = [one for one in everybody if tolerance_of(one, workload) is not None]
    for connections in benchmark.options.connections:
        if (workload, DIRECT, connections) in benchmark.results.measurements:
            lines += [f"{connections} connection{'s' * (connections > 1)}:", ""]
            lines += [*table(benchmark.results, workload, connections, taking_part), ""]
    return "\n".join(lines)


def machine(benchmark: Benchmark) -> list[str]:
    """Return the lines about when, on what and with which versions it was measured."""
    options, results = benchmark.options, benchmark.results
    loads = [" ".join(f"{load:.2f}" for load in loads) for loads in (benchmark.load_before, os.getloadavg())]
    installed = dict.fromkeys(["ours", *(SERVERS[name].installed_as or name for name in options.servers)])
    lines = [
        f"* {benchmark.began}, {options.generator}",
        f"* {rounds(benchmark)}",
        f"* {cpu_name()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 1e9:.0f} GB; "
        f"{platform.system()} {platform.release()}",
        f"* load average before: {loads[0]}, at the end (the benchmark's own included): {loads[1]}",
        f"* Python {platform.python_version()}, this server at commit {commit()}",
        *(f"* {name}: {', '.join(pins(name))}" for name in installed),
    ]
    for when, shares in (("before", results.other_work), ("during", results.other_work_during)):
        if shares:
            used = f"{median(shares):.0%} of the machine, {max(shares):.0%} at most"
            lines.append(f"* other programs {when} the measurements: {used}{warning(shares)}")
    if options.generator == "python" and "W0" in options.workloads:
        lines.append("* **The generator in Python takes too much of the machine for W0: its numbers do not count.**")
    return lines


def rounds(benchmark: Benchmark) -> str:
    """Return of how many rounds the numbers are."""
    n_rounds, seconds = benchmark.options.rounds, benchmark.options.seconds
    if not benchmark.complete:
        most = max(map(len, benchmark.results.measurements.values()), default=0)
        return f"**interrupted**: medians of up to {most} of {n_rounds} rounds of {seconds:g} s or more"
    if n_rounds == 1:
        return f"one round of {seconds:g} s or more"
    return f"medians of {n_rounds} rounds of {seconds:g} s, or of fewer and longer ones"


def warning(shares: list[float]) -> str:
    """Return what to say of a machine of which others use such shares: nothing if it was as good as idle."""
    return ". **The machine was not idle: these numbers do not count.**" if median(shares) > MAX_OTHER_WORK else ""


def pins(name: str) -> list[str]:
    """Return the pinned packages of a server's environment."""
    lines = (BENCHMARKS / "requirements" / f"{name}.txt").read_text().splitlines()
    return [line.replace("==", " ") for line in lines if "==" in line]


def cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    finished = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return finished.stdout.strip() or "unknown"


def label(contender: Contender) -> str:
    if contender == DIRECT:
        return contender.name
    return f"{contender.name}, {contender.n_processes} process{'es' * (contender.n_processes > 1)}"


def last_line(text: str) -> str:
    return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "no output")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure this server and its peers; write benchmarks/RESULTS.md.")
    choose = parser.add_argument
    choose("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), help="default: all")
    choose("--servers", nargs="+", choices=list(SERVERS), default=list(SERVERS), help="default: all")
    choose("--connections", nargs="+", type=int, default=[1, 32, 256], help="default: 1 32 256")
    cores = os.cpu_count() or 1
    processes = sorted({2, min(cores, 4) + 1})
    text = "processes of a server, its engine or front end included; at least 2; default: 2, and one more than cores"
    choose("--processes", nargs="+", type=int, default=processes, help=text)
    choose("--seconds", type=float, default=10, help="how long each measurement takes; default: 10")
    choose("--rounds", type=int, default=3, help="how often each is taken; medians count; default: 3")
    choose("--generator", choices=["wrk", "python"], default=choose_generator(), help="default: wrk if installed")
    choose("--output", type=Path, default=BENCHMARKS / "RESULTS.md", help="default: benchmarks/RESULTS.md")
    options = parser.parse_args(arguments)
    if min(options.processes) < 2:
        parser.error("--processes: this server has at least 2, a web worker and the engine")
    for name in ("connections", "seconds", "rounds"):
        given = getattr(options, name)
        if not min(given if isinstance(given, list) else [given]) >= 1:  # not a number is not, either
            parser.error(f"--{name}: at least 1")
    if options.generator == "wrk" and choose_generator() != "wrk":
        parser.error("--generator: wrk is not installed")
    return options


def write(path: Path, text: str) -> None:
    """Write a file, all at once: an interruption leaves the one that was there."""
    if path.is_symlink() or (path.exists() and not path.is_file()):  # a terminal, say: not to be replaced by a file
        path.write_text(text)
        return
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text)
    os.replace(beside, path)


def end_by_signals() -> None:
    """Have what ends a program end it as an exception does, so that what it has started is stopped, too."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda number, _: sys.exit(128 + number))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    end_by_signals()
    benchmark = Benchmark(options)
    try:
        benchmark.run()
    finally:
        if benchmark.results.measurements:
            before = options.output.read_text() if options.output.is_file() else ""
            text = report(benchmark, before)
            write(options.output, text)
            say(f"\n{text}\nwritten to {options.output}")
    if benchmark.results.failures:
        raise SystemExit("some servers could not be measured: the table says why")


if __name__ == "__main__":
    main()
