"""Load generators: so many connections, each of which sends its next request when the last one is answered.

Latencies are those of all answers, whatever their status. Errors are answers with a status of 400 or more, and
connections that broke or could not be made; one that the server says it closes is none. What has not been answered when
the time is up is not counted, but by the generator in Python, where a connection had neither an answer nor an error.
"""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

ROOT: Final = Path(__file__).resolve().parents[1]
#: Longer than any answer takes: a slow answer counts as slow, not as an error.
TIMEOUT_S: Final = 600


@dataclass(frozen=True)
class Measurement:
    """Answers without an error's status a second, the latency of all answers, and how many errors there were."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    n_errors: int


def summarize(latencies_s: list[float], seconds: float, n_failed: int = 0, n_broken: int = 0) -> Measurement:
    """Return the measurement of answers that came within ``seconds``.

    Args:
        latencies_s: of all answers.
        seconds: for how long there were requests.
        n_failed: how many of the answers had an error's status.
        n_broken: how many other errors there were.
    """
    ordered = sorted(latencies_s)
    rate = (len(ordered) - n_failed) / seconds
    return Measurement(rate, 1e3 * quantile(ordered, 0.5), 1e3 * quantile(ordered, 0.99), n_failed + n_broken)


def quantile(ordered: list[float], part: float) -> float:
    """Return the smallest value that at least ``part`` of the values do not exceed; 0 where there is none."""
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)] if ordered else 0.0


def choose_generator() -> str:
    """Return ``wrk`` where it is installed, ``python`` elsewhere."""
    return "wrk" if shutil.which("wrk") else "python"


def measure(generator: str, url: str, bodies: list[str], connections: int, seconds: float) -> Measurement:
    """Load a server from another process and return what came of it."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write("".join(f"{body}\n" for body in bodies))
        file.flush()
        if generator == "wrk":
            options = ["--threads", "1", "--connections", str(connections), "--duration", f"{math.ceil(seconds)}s"]
            script = str(ROOT / "benchmarks" / "wrk.lua")
            command = ["wrk", *options, "--timeout", f"{TIMEOUT_S}s", "--script", script, url, "--"]
            command += [file.name, str(connections)]
        else:
            command = [sys.executable, __file__, url, file.name, str(connections), str(seconds)]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Measurement(**json.loads(finished.stdout.strip().splitlines()[-1]))


async def generate(url: str, bodies: list[str], connections: int, seconds: float) -> Measurement:
    """Load a server from this process: wrk's stand-in, which takes ten times as much of the machine for itself."""
    parts = urlsplit(url)
    head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    requests = cycle([f"{head}Content-Length: {len(body.encode())}\r\n\r\n{body}".encode() for body in bodies])
    tally = _Tally(set(range(connections)))
    begun = time.perf_counter()
    tasks = [
        asyncio.create_task(_keep_asking(parts.hostname or "", parts.port or 80, requests, tally, index))
        for index in range(connections)
    ]
    await asyncio.sleep(seconds)
    seconds = time.perf_counter() - begun
    result = summarize(tally.latencies_s, seconds, tally.n_failed, tally.n_broken + len(tally.silent))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return result


@dataclass
class _Tally:
    """What came of all connections."""

    #: The connections that have had neither an answer nor an error.
    silent: set[int]
    latencies_s: list[float] = field(default_factory=list)
    n_failed: int = 0
    n_broken: int = 0

    def answered(self, connection: int, latency_s: float, status: int) -> None:
        self.silent.discard(connection)
        self.latencies_s.append(latency_s)
        self.n_failed += status >= 400

    def broke(self, connection: int) -> None:
        self.silent.discard(connection)
        self.n_broken += 1


async def _keep_asking(host: str, port: int, requests: Iterator[bytes], tally: _Tally, index: int) -> None:
    while True:
        try:
            reader, writer = await asyncio.open_connection(host, port)
        except OSError:
            tally.broke(index)
            await asyncio.sleep(0.1)
            continue
        try:
            stays = True
            while stays:
                before = time.perf_counter()
                writer.write(next(requests))
                status, stays = await _read_answer(reader)
                tally.answered(index, time.perf_counter() - before, status)
        except Exception:  # whatever an answer that is not HTTP leads to
            tally.broke(index)
        finally:
            writer.close()


async def _read_answer(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Read one answer and return its status, and whether the connection takes another request."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
    headers = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    version, status = first.split()[:2]
    wish = headers.get("connection", "")
    stays = "keep-alive" in wish if version == "http/1.0" else "close" not in wish
    if "chunked" in headers.get("transfer-encoding", ""):
        while n_bytes := int(await reader.readuntil(b"\r\n"), 16):
            await reader.readexactly(n_bytes + 2)
        await reader.readuntil(b"\r\n")
    elif "content-length" in headers or stays:
        await reader.readexactly(int(headers.get("content-length", 0)))
    else:
        await reader.read()
    return int(status), stays


if __name__ == "__main__":
    sent = Path(sys.argv[2]).read_text().splitlines()
    measured = asyncio.run(generate(sys.argv[1], sent, int(sys.argv[3]), float(sys.argv[4])))
    sys.stdout.write(json.dumps(vars(measured)) + "\n")
