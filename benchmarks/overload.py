"""Ask the routes that need no model while 1,000 connections ask a slow one, and print how long their answers take.

    python benchmarks/overload.py
    python benchmarks/overload.py --connections 300 --seconds 10 --workers 2

All connections are made, and ask, at the same moment. After a refusal (429), *patient* clients wait for as long as
``Retry-After`` says; *impatient* ones ask again at once, which is all that the server can do, all the time. Each
question to the other routes comes on a connection of its own, as a supervisor asks, or on one that is kept.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.bench import end_by_signals  # noqa: E402 - the path is set above
from benchmarks.load import quantile  # noqa: E402
from benchmarks.soak import all_requests, running_server  # noqa: E402

SETTINGS: Final = {"FAKE_SECONDS": "0.5", "FAKE_LOAD_SECONDS": "0", "MAX_QUEUE_SIZE": "32", "MAX_BATCH_SIZE": "8"}
SLOW: Final = next(request for request in all_requests() if request.model == "fake_slow")
ROUTES: Final = ("/health/live", "/api/tasks/list", "/metrics")
PROBE_INTERVAL_S: Final = 0.02
TIMEOUT_S: Final = 60.0
N_FILES: Final = 8192


class Probe(NamedTuple):
    """One answer: when it was asked for, on the clock of ``time.monotonic()``, and what it took."""

    asked: float
    seconds: float
    route: str


# The load, in a process of its own


async def load(address: str, connections: int, seconds: float, patient: bool) -> dict[str, Any]:
    """Load a server, and return when the last client had its first answer, and each answer's time by its status."""
    began = time.monotonic()
    head = f"POST {SLOW.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(SLOW.body)}\r\n\r\n{SLOW.body}".encode()
    host, _, port = address.rpartition(":")
    taken: defaultdict[str, list[float]] = defaultdict(list)
    first_answers: list[float] = []
    end = began + seconds

    async def client() -> None:
        is_first = is_open = True
        reader, writer = await asyncio.open_connection(host, port)
        while time.monotonic() < end or is_first:
            if not is_open:
                reader, writer = await asyncio.open_connection(host, port)
            asked = time.monotonic()
            writer.write(request)
            try:
                answer = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(answer.partition(b"content-length:")[2].split()[0]))
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                taken[type(error).__name__].append(time.monotonic() - asked)
                is_open = False
                continue
            answered, status = time.monotonic(), answer[9:12].decode()
            taken[status].append(answered - asked)
            if is_first:
                first_answers.append(answered)
                is_first = False
            is_open = b"connection: close" not in answer
            if not is_open:
                writer.close()
            if status == "429" and patient:
                await asyncio.sleep(float(answer.partition(b"retry-after:")[2].split()[0]))
        writer.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(client())
    return {"began": began, "burst_over": max(first_answers), "taken": taken}


# The questions


def probe(address: str, generator: subprocess.Popen[bytes]) -> list[Probe]:
    """Ask the routes in turn until the load is over."""
    seen: list[Probe] = []
    kept = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
    while generator.poll() is None:
        n = len(seen)
        route, is_new = ROUTES[n % len(ROUTES)], n // len(ROUTES) % 2 == 0
        connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S) if is_new else kept
        asked = time.monotonic()
        ask(connection, route)
        seen.append(Probe(asked, time.monotonic() - asked, route))
        if is_new:
            connection.close()
        time.sleep(PROBE_INTERVAL_S)
    kept.close()
    return seen


def ask(connection: http.client.HTTPConnection, route: str) -> None:
    """Ask for a route and read all of the answer, which must be a 200."""
    try:
        connection.request("GET", route)
        answer = connection.getresponse()
    except (http.client.RemoteDisconnected, ConnectionError):  # the server had closed it, since it was idle for long
        connection.close()
        connection.request("GET", route)
        answer = connection.getresponse()
    answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{route} was answered with {answer.status}")


# The report


def measure(options: argparse.Namespace, patience: str) -> list[str]:
    """Start a server, load and ask it, and return the lines of the report."""
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Path(folder), options.workers, SETTINGS) as (_, address),
    ):
        warm_up(address)
        numbers = [str(options.connections), str(options.seconds)]
        command = [sys.executable, __file__, "--load", address, *numbers, patience]
        told = Path(folder) / "load.json"  # a pipe would have to be read meanwhile
        with told.open("wb") as file, subprocess.Popen(command, stdout=file) as generator:
            try:
                probes = probe(address, generator)
            finally:
                generator.kill()  # unless it has ended by itself
        return list(report(patience, json.loads(told.read_text()), probes))


def warm_up(address: str) -> None:
    """Have the model loaded, and whatever is made for a route's first request."""
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
    connection.request("POST", SLOW.path, SLOW.body, {"Content-Type": "application/json"})
    connection.getresponse().read()
    for route in ROUTES:
        ask(connection, route)
    connection.close()


def report(patience: str, told: dict[str, Any], probes: list[Probe]) -> Iterator[str]:
    burst_over = told["burst_over"]
    yield f"{patience} clients; all had a first answer after {burst_over - told['began']:.1f} s"
    for status, taken in sorted(told["taken"].items()):
        yield f"  answers {status}: {summary(taken)}"
    for route in ROUTES:
        asked = [one for one in probes if one.route == route]
        yield f"  {route} until then: {summary(one.seconds for one in asked if one.asked < burst_over)}"
        yield f"  {route} afterwards: {summary(one.seconds for one in asked if one.asked >= burst_over)}"


def summary(seconds: Iterable[float]) -> str:
    ordered = sorted(seconds)
    if not ordered:
        return "none"
    worst = f"99 % {1e3 * quantile(ordered, 0.99):.0f} ms, at most {1e3 * ordered[-1]:.0f} ms"
    return f"median {1e3 * median(ordered):.1f} ms, {worst} (of {len(ordered)})"


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(N_FILES, hard)), hard))
    if arguments[:1] == ["--load"]:
        address, connections, seconds, patience = arguments[1:]
        loading = load(address, int(connections), float(seconds), patience == "patient")
        print(json.dumps(asyncio.run(loading)))  # noqa: T201
        return
    end_by_signals()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--clients", nargs="+", choices=["patient", "impatient"], default=["patient", "impatient"])
    options = parser.parse_args(arguments)
    for patience in options.clients:
        print("\n".join(measure(options, patience)), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
