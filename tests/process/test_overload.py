"""More clients than a model can serve: refusals, memory, latency, and the routes that need no model."""

from __future__ import annotations

import asyncio
import json
import re
import resource
import select
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from urllib.parse import urlsplit

import psutil
import pytest

from dev_server import ROOT
from tests.conftest import Server
from tests.http.bad_requests import PNG
from tests.process.raw_http import connect, post, read_answer

pytestmark = pytest.mark.process

SLOW = "/api/models/fake_slow/tasks/image_captioning/features"
N_CLIENTS = 1000
CALL_S = 0.5
BATCH_SIZE = 4
QUEUE_SIZE = 16
#: The load goes on until so many were served, in ten calls: however slow the machine, the queue is full for long.
N_SERVED = 10 * BATCH_SIZE
#: Only to end what hangs.
TIMEOUT_S = 240.0
N_FILES = 4096
#: Requests that wait to be accepted; ``select`` takes no more than 1,024 files.
N_WAITING = 500
HEALTH = b"GET /api/tasks/list HTTP/1.1\r\nHost: localhost\r\n\r\n"
MIB = 1 << 20


@dataclass
class Answer:
    status: int
    seconds: float
    headers: dict[str, str]
    body: bytes

    def milliseconds(self, name: str) -> float:
        """Return what the server itself says of where the time went."""
        (value,) = re.findall(rf"\b{name};dur=([\d.]+)", self.headers["server-timing"])
        return float(value)

    def batch_size(self) -> int:
        """Return with how many requests, itself included, it shared a call of the model."""
        return int(re.findall(r"in a batch of (\d+),", json.loads(self.body)[0])[0])


@dataclass
class Overload:
    """What clients saw, who ask at once, and again ``Retry-After`` after a refusal, until enough were served."""

    answers: list[Answer] = field(default_factory=list)
    health: list[Answer] = field(default_factory=list)
    peak_memory: int = 0

    def of_status(self, status: int) -> list[Answer]:
        return [answer for answer in self.answers if answer.status == status]


class Connection:
    """One kept HTTP connection; each request must get its answer."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname, parts.port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: bytes = b"") -> Answer:
        begun = time.monotonic()
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)
        reader, writer = self._streams
        head = f"{method} {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        content = await reader.readexactly(int(headers["content-length"]))
        if headers.get("connection") == "close":
            await self.close()
        return Answer(int(status_line.split()[1]), time.monotonic() - begun, headers, content)

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            await self._streams[1].wait_closed()
            self._streams = None


def processes_of(server: Server) -> set[psutil.Process]:
    master = psutil.Process(server.process.pid)
    return {master, *master.children(recursive=True)}


def memory_of(processes: set[psutil.Process]) -> int:
    return sum(process.memory_info().rss for process in processes)


async def overload(server: Server) -> Overload:
    seen = Overload()
    body = json.dumps({"image": PNG}).encode()
    over = asyncio.Event()
    processes = processes_of(server)

    async def client() -> None:
        connection = Connection(server.url)
        while not over.is_set():
            seen.answers.append(answer := await connection.ask("POST", SLOW, body))
            if answer.status == 200 and len(seen.of_status(200)) == N_SERVED:
                over.set()
            if answer.status == 429:
                await asyncio.sleep(float(answer.headers["retry-after"]))
        await connection.close()

    async def look_around() -> None:
        connection = Connection(server.url)
        while not over.is_set():
            seen.health.append(await connection.ask("GET", "/api/tasks/list"))
            seen.peak_memory = max(seen.peak_memory, memory_of(processes))
            await asyncio.sleep(0.05)
        await connection.close()

    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
        group.create_task(look_around())
        for _ in range(N_CLIENTS):
            group.create_task(client())
    return seen


@pytest.fixture
def files_for_clients() -> Iterator[Callable[[], None]]:
    """Lower the limit of open files to what is usual; the function returned lets this process have more again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < N_FILES:
        pytest.skip(f"needs {N_FILES} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (N_FILES, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_thousand_clients_of_a_slow_model_are_served_up_to_the_queues_bound_and_refused_beyond_it(
    gunicorn: Callable[..., Server], files_for_clients: Callable[[], None]
) -> None:
    server = gunicorn(
        "-c",
        str(ROOT / "gunicorn.conf.py"),
        "--keep-alive",
        "60",  # a client that is late to ask again still has its connection
        MAX_QUEUE_SIZE=str(QUEUE_SIZE),
        MAX_BATCH_SIZE=str(BATCH_SIZE),
        FAKE_SECONDS=str(CALL_S),
        FAKE_LOAD_SECONDS="0",
    )
    files_for_clients()
    server.post(SLOW, {"image": PNG})
    processes = processes_of(server)
    memory = memory_of(processes)

    seen = asyncio.run(overload(server))
    afterwards = server.post(SLOW, {"image": PNG})

    assert {answer.status for answer in seen.answers} == {200, 429}
    accepted, refused = seen.of_status(200), seen.of_status(429)
    assert {json.loads(answer.body)["code"] for answer in refused} == {"queue_full"}
    assert min(int(answer.headers["retry-after"]) for answer in refused) >= 1
    # Whoever is accepted has a full queue before it at most (and the call under way), not all clients.
    n_calls_at_most = QUEUE_SIZE / BATCH_SIZE + 1
    call_ms = max(answer.milliseconds("compute") for answer in accepted)
    assert max(answer.milliseconds("queue") for answer in accepted) < 3 * n_calls_at_most * call_ms
    # The model is never without work.
    assert median(answer.batch_size() for answer in accepted) == BATCH_SIZE
    assert {answer.status for answer in seen.health} == {200}
    assert median(answer.seconds for answer in seen.health) < median(answer.seconds for answer in accepted)
    assert seen.peak_memory - memory < 200 * MIB
    assert processes_of(server) == processes
    # Nothing of the load is left in the queue.
    assert "in a batch of 1," in afterwards.json()[0]


def test_routes_that_need_no_model_are_answered_before_hundreds_of_requests_that_came_first(
    gunicorn: Callable[..., Server], files_for_clients: Callable[[], None]
) -> None:
    server = gunicorn("-c", str(ROOT / "gunicorn.conf.py"), MAX_QUEUE_SIZE=str(QUEUE_SIZE), FAKE_SECONDS=str(CALL_S))
    files_for_clients()
    server.post(SLOW, {"image": PNG})
    body = json.dumps({"image": PNG}).encode()
    (worker,) = psutil.Process(server.process.pid).children()
    with ExitStack() as connections:
        kept = connections.enter_context(connect(server))
        kept.sendall(HEALTH)
        assert read_answer(kept)[0] == 200

        worker.suspend()
        clients = [connections.enter_context(connect(server)) for _ in range(N_WAITING)]
        for client in clients:
            client.sendall(post(SLOW, body, f"Content-Length: {len(body)}"))
        new = connections.enter_context(connect(server))
        for connection in (new, kept):
            connection.sendall(HEALTH)
        worker.resume()
        statuses = [read_answer(connection)[0] for connection in (new, kept)]
        answered, _, _ = select.select(clients, [], [], 0)

        assert statuses == [200, 200]
        assert len(answered) < N_WAITING / 2
        assert {read_answer(client)[0] for client in clients} == {200, 429}
