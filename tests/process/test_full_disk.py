"""A server whose disk for temporary files is full."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import requests

from tests.conftest import Server, gunicorn_command, starting
from tests.waiting import at_once, wait_until

pytestmark = pytest.mark.process

ECHO = "/api/tasks/fake_shout/models/fake_echo/features"
JOBS = "/api/tasks/fake_shout/models/fake_echo/jobs"
THREADS = ("-k", "gthread", "--threads", "16")
#: Runs a command with a disk of its own for temporary files, which nobody else sees and which goes with it.
WITH_OWN_DISK = [
    "unshare",
    "--map-root-user",
    "--mount",
    "sh",
    "-c",
    'mount -t tmpfs -o size=8m x "$TMPDIR" && exec "$@"',
    "sh",
]


@pytest.fixture
def disk() -> Iterator[Path]:
    """The path under which a server finds its disk: short enough for a socket there."""
    with tempfile.TemporaryDirectory(prefix="disk-") as disk:
        try:
            subprocess.run([*WITH_OWN_DISK, "true"], env={"TMPDIR": disk}, check=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("this system lets nobody mount a disk")
        yield Path(disk)


@pytest.fixture
def server(tmp_path: Path, disk: Path) -> Iterator[Server]:
    def command(port: int, *arguments: str) -> list[str]:
        return [*WITH_OWN_DISK, *gunicorn_command(port, *arguments)]

    with starting(tmp_path, command) as start:
        yield start("-w", "2", *THREADS, TMPDIR=str(disk))


def fill(path: Path) -> None:
    with suppress(OSError), path.open("wb", buffering=0) as file:  # until there is no room for more
        while True:
            file.write(bytes(4096))


def n_counted(server: Server) -> int:
    return server.get("/metrics").text.count("fes_requests_total{")


def answers(server: Server) -> bool:
    try:
        return all(answer.ok for answer in at_once(4, lambda _: server.get("/health/live")))
    except requests.ConnectionError:
        return False


def test_requests_are_answered_by_workers_that_begin_when_the_disk_is_full(server: Server, disk: Path) -> None:
    seen_by_server = Path(f"/proc/{server.process.pid}/root{disk}")
    for counted in seen_by_server.glob("fes-*/metrics/*"):
        counted.unlink()  # so that there is nothing to count on in
    fill(seen_by_server / "filling")
    before = server.workers()
    for worker in before:
        worker.kill()
    wait_until(lambda: len(server.workers() - before) == 2, "the next workers")
    wait_until(lambda: answers(server), "the next workers' answers")
    begun = server.workers()

    shouts = at_once(20, lambda n: server.post(ECHO, {"text": f"hi {n}"}))
    job = server.post(JOBS, {"text": "hi"})

    assert [shout.json() for shout in shouts] == [f"HI {n}!" for n in range(20)]
    assert job.status_code == 202 or "disk is full" in job.json()["error"]  # the jobs' file may have room left
    assert n_counted(server) == 0
    assert server.workers() == begun

    (seen_by_server / "filling").unlink()

    wait_until(lambda: server.post(JOBS, {"text": "hi"}).status_code == 202, "a stored job")
    assert n_counted(server) > 0
