"""Load generators: so many connections, each of which sends its next request when the last one is answered."""

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
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

ROOT: Final = Path(__file__).resolve().parents[1]
#: Longer than any answer takes: a slow answer counts as slow, not as an error.
TIMEOUT_S: Final = 600


@dataclass(frozen=True)
class Measurement:
    """Answers with a status of success a second, the latency of all answers, and how many requests failed."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    n_errors: int


def summarize(latencies_s: list[float], seconds: float, n_errors: int) -> Measurement:
    """Return the measurement of answers that came within ``seconds``."""
    ordered = sorted(latencies_s)
    return Measurement(len(ordered) / seconds, 1e3 * quantile(ordered, 0.5), 1e3 * quantile(ordered, 0.99), n_errors)


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
            command = ["wrk", *options, "--timeout", f"{TIMEOUT_S}s", "--script", script, url, "--", file.name]
        else:
            command = [sys.executable, __file__, url, file.name, str(connections), str(seconds)]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Measurement(**json.loads(finished.stdout.strip().splitlines()[-1]))


async def generate(url: str, bodies: list[str], connections: int, seconds: float) -> Measurement:
    """Load a server from this process: wrk's stand-in, which takes ten times as much of the machine for itself."""
    parts = urlsplit(url)
    head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    requests = cycle([f"{head}Content-Length: {len(body.encode())}\r\n\r\n{body}".encode() for body in bodies])
    latencies_s: list[float] = []
    errors: list[str] = []
    begun = time.perf_counter()
    tasks = [
        asyncio.create_task(_keep_asking(parts.hostname or "", parts.port or 80, requests, latencies_s, errors))
        for _ in range(connections)
    ]
    await asyncio.sleep(seconds)
    result = summarize(latencies_s, time.perf_counter() - begun, len(errors))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return result


async def _keep_asking(
    host: str, port: int, requests: Iterator[bytes], latencies_s: list[float], errors: list[str]
) -> None:
    while True:
        try:
            reader, writer = await asyncio.open_connection(host, port)
        except OSError as error:
            errors.append(str(error))
            await asyncio.sleep(0.1)
            continue
        try:
            while True:
                before = time.perf_counter()
                writer.write(next(requests))
                status = await _read_answer(reader)
                if status < 400:
                    latencies_s.append(time.perf_counter() - before)
                else:
                    errors.append(str(status))
        except (OSError, asyncio.IncompleteReadError) as error:
            errors.append(str(error))
        finally:
            writer.close()


async def _read_answer(reader: asyncio.StreamReader) -> int:
    """Read one answer and return its status."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
    headers: dict[str, Any] = dict(line.split(": ", 1) for line in head[1:] if ": " in line)
    if "chunked" in headers.get("transfer-encoding", ""):
        while n_bytes := int(await reader.readuntil(b"\r\n"), 16):
            await reader.readexactly(n_bytes + 2)
        await reader.readuntil(b"\r\n")
    else:
        await reader.readexactly(int(headers.get("content-length", 0)))
    return int(head[0].split()[1])


if __name__ == "__main__":
    sent = Path(sys.argv[2]).read_text().splitlines()
    measured = asyncio.run(generate(sys.argv[1], sent, int(sys.argv[3]), float(sys.argv[4])))
    sys.stdout.write(json.dumps(vars(measured)) + "\n")
