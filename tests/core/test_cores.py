"""A web worker keeps to one core; what it decodes and starts does not, nor does it while it decodes large pictures."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from feature_extraction_server.core import cores

ALLOWED = cores.ALLOWED
pytestmark = pytest.mark.skipif(len(ALLOWED) < 2, reason="there is only one core")


@pytest.fixture
def in_thread(places_given_back: None) -> Iterator[Callable[[Callable[[], object]], None]]:
    """Run something in a thread of its own, since cores belong to threads; forget the choice afterwards."""

    def run(function: Callable[[], object]) -> None:
        thread = threading.Thread(target=function)
        thread.start()
        thread.join(20)

    yield run
    cores._own.clear()


def run_apart(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, whose cores it may choose."""
    return subprocess.run(
        [sys.executable, "-c", source, str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({}, math.inf),
    ],
    ids=["version 2", "version 2 without a limit", "version 1", "version 1 without a limit", "none"],
)
def test_what_a_container_may_use_is_read_from_its_cgroup(
    tmp_path: Path, files: dict[str, str], expected: float
) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    assert cores._quota(tmp_path) == expected


def test_threads_started_later_keep_to_the_same_core(tmp_path: Path, in_thread: Callable[..., None]) -> None:
    seen = []

    def work() -> None:
        cores.keep_to_one_core(tmp_path, 0)
        inner = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        inner.start()
        inner.join(20)

    in_thread(work)

    assert seen == [{ALLOWED[0]}]


def test_a_thread_that_decodes_may_use_all_cores_meanwhile(tmp_path: Path, in_thread: Callable[..., None]) -> None:
    seen = []

    def work() -> None:
        cores.keep_to_one_core(tmp_path, 0)
        with cores.all_cores():
            seen.append(os.sched_getaffinity(0))
        seen.append(os.sched_getaffinity(0))

    in_thread(work)

    assert seen == [set(ALLOWED), {ALLOWED[0]}]


OTHER_CORES = """
import os, sys
from pathlib import Path
from feature_extraction_server.core import cores
cores.keep_to_one_core(Path(sys.argv[1]), 0)
cores.ALLOWED[:] = [1000, 1001]  # as if the container had been given others since
with cores.all_cores():
    pass
cores.spread()
print(len(os.sched_getaffinity(0)))
"""


def test_cores_that_a_container_has_no_longer_are_no_error(tmp_path: Path) -> None:
    ended = run_apart(OTHER_CORES, tmp_path)

    assert (ended.stderr, ended.returncode, ended.stdout) == ("", 0, "1\n")


def test_without_room_for_what_is_shared_a_process_uses_all_cores(
    tmp_path: Path, in_thread: Callable[..., None]
) -> None:
    seen = []

    def work() -> None:
        cores.keep_to_one_core(tmp_path / "gone", 0)
        with cores.all_cores():
            seen.append(os.sched_getaffinity(0))
        seen.append(os.sched_getaffinity(0))

    in_thread(work)

    assert seen == [set(ALLOWED)] * 2


def test_a_process_that_keeps_to_no_core_is_left_alone(in_thread: Callable[..., None]) -> None:
    seen = []

    def work() -> None:
        with cores.all_cores():
            seen.append(os.sched_getaffinity(0))

    in_thread(work)

    assert seen == [set(ALLOWED)]


SPREAD = """
import os, sys, threading, time
from pathlib import Path
from feature_extraction_server.core import cores
cores.KEEP_AGAIN_AFTER_S = 0.5
cores.keep_to_one_core(Path(sys.argv[1]), 0)
stay = threading.Event()
other = threading.Thread(target=stay.wait)
other.start()

def n_cores():
    return [len(os.sched_getaffinity(thread)) for thread in (0, other.native_id)]

def wait_until_kept():
    give_up_at = time.monotonic() + 20
    while n_cores()[1] > 1 and time.monotonic() < give_up_at:
        time.sleep(0.01)

print(n_cores())
for _ in range(30):
    cores.spread()
    assert n_cores() == [len(cores.ALLOWED)] * 2
    time.sleep(0.02)
wait_until_kept()
print(n_cores())
with cores.all_cores():
    cores.spread()
    wait_until_kept()
    print(n_cores())
print(n_cores())
stay.set()
"""


def test_all_threads_may_use_all_cores_until_nothing_large_was_decoded_for_a_while(tmp_path: Path) -> None:
    ended = run_apart(SPREAD, tmp_path)

    assert (ended.stderr, ended.returncode) == ("", 0)
    # The thread that decodes, or starts a process, and another one.
    assert ended.stdout.splitlines() == ["[1, 1]", "[1, 1]", f"[{len(ALLOWED)}, 1]", "[1, 1]"]


CHOOSE = """
import os, sys
from pathlib import Path
from feature_extraction_server.core.cores import keep_to_one_core
keep_to_one_core(Path(sys.argv[1]), int(sys.argv[2]))
print(*os.sched_getaffinity(0), flush=True)
sys.stdin.read()
"""


def test_processes_share_the_cores_evenly_and_one_that_died_makes_room(tmp_path: Path) -> None:
    def start() -> tuple[subprocess.Popen[str], int]:
        process = subprocess.Popen(
            [sys.executable, "-c", CHOOSE, str(tmp_path), "1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdout is not None
        return process, int(process.stdout.readline())

    started = [start() for _ in range(2 * len(ALLOWED))]
    try:
        chosen = [core for _, core in started]
        assert sorted(chosen) == sorted(2 * ALLOWED)
        assert chosen[0] == ALLOWED[1]

        started[0][0].kill()
        started[0][0].wait(20)
        started.append(start())
        assert started[-1][1] == chosen[0]
    finally:
        for process, _ in started:
            process.kill()
            process.communicate()
