"""Run a server under mixed load for minutes, and tell whether it lost, mixed up or leaked anything.

    python benchmarks/soak.py --minutes 10

Clients ask four models of ``tests/fakes``: a fast one, a slow one, one that fails on some pictures, and one in a
process of its own which some pictures kill. Meanwhile the models are stopped and started. Every request must end in
the right answer or in an error that its picture or a stop accounts for; memory, threads and file descriptors of the
server's processes must not grow, and none of these may end; at the end, all of it must be gone. The exit status is 1
where this does not hold.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import math
import os
import random
import select
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.bench import end_by_signals, free_port, kill, stop  # noqa: E402 - the path is set above

PLUGIN_PATH = [ROOT / "feature_extraction_server-core", *sorted((ROOT / "plugins").iterdir()), ROOT / "tests" / "fakes"]
SETTINGS = {"FAKE_SECONDS": "0.03", "FAKE_LOAD_SECONDS": "0.05", "STOP_GRACE_PERIOD": "10", "MAX_QUEUE_SIZE": "64"}

CLIENT_TIMEOUT_S = 60.0
SAMPLE_INTERVAL_S = 0.25
#: A model that was stopped, or whose process was killed, answers again within this time, on a busy machine as well.
RECOVERY_S = 20.0
#: How much more of it a process may have in the run's last quarter than in its second one.
ALLOWED_GROWTH = {"MiB": 16.0, "threads": 8.0, "files": 8.0}
#: What the system calls the memory for pictures (``core/pixels.py``).
REGION = "feature_extraction_server-pixels"
#: What a stop, a full queue or another request's picture may bring upon any request.
UNLUCKY = {"503 model_unavailable", "429 queue_full"}
RIGHT = "200"


@dataclass(frozen=True)
class Request:
    """A request, the caption it must get (or the beginning of it), and how else it may end."""

    model: str
    body: str
    caption: str
    outcomes: frozenset[str]

    @property
    def path(self) -> str:
        return f"/api/models/{self.model}/tasks/image_captioning/features"


@dataclass
class Record:
    """What was seen: how requests ended, what was done to models, and how much of what each process had, by sample."""

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    #: When each model last gave a right answer, on the clock of ``time.monotonic()``.
    last_right: dict[str, float] = field(default_factory=dict)
    operations: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    samples: list[dict[tuple[str, str], float]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, request: Request, outcome: str) -> None:
        with self.lock:
            self.outcomes[request.model][outcome] += 1
            if outcome == RIGHT:
                self.last_right[request.model] = time.monotonic()
            if outcome not in request.outcomes:
                self.violations.append(f"{request.model} {request.caption!r}: {outcome}")


def all_requests() -> list[Request]:
    """Return requests of every kind; what kills a process is one in 500 of them."""

    def request(model: str, width: int, caption: str, *outcomes: str) -> Request:
        file = io.BytesIO()
        Image.new("RGB", (width, 9), "red").save(file, "PNG")
        body = json.dumps({"image": base64.b64encode(file.getvalue()).decode()})
        return Request(model, body, caption, frozenset(outcomes) | UNLUCKY)

    requests = []
    for width in range(10, 40):
        requests += [
            request("fake_echo", width, f"{width}x9 (255, 0, 0)", RIGHT),
            request("fake_slow", width, f"{width} in a batch of ", RIGHT),
            request("fake_fragile", width, f"width {width} in process ", RIGHT),
            request("fake_flaky", width, f"lucky width {width}", RIGHT if width % 7 else "500 model_error"),
        ]
    requests *= 4
    requests.append(request("fake_slow", 1, "", "500 model_error"))
    requests.append(request("fake_fragile", 2, ""))  # ends its process
    requests.append(request("fake_fragile", 5, "", "500 model_error"))
    requests.append(Request("fake_echo", '{"image": "no picture"}', "", frozenset({"400 invalid_input"})))
    return requests


def send(address: str, requests: list[Request], record: Record, ended: threading.Event, seed: int) -> None:
    """Send one request after another, until ``ended``, over a connection that is kept as long as the server does."""
    chance = random.Random(seed)
    connection = http.client.HTTPConnection(address, timeout=CLIENT_TIMEOUT_S)
    while not ended.is_set():
        if connection.sock is not None and select.select([connection.sock], [], [], 0)[0]:
            connection.close()  # the server closed it after its last answer
        request = chance.choice(requests)
        try:
            outcome = ask(connection, request)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            outcome = f"lost: {type(error).__name__}: {error}"
        except Exception as error:  # of an answer that looks like none that the server should give
            connection.close()
            outcome = f"wrong answer: {type(error).__name__}: {error}"
        record.add(request, outcome)
        if outcome != RIGHT:
            ended.wait(0.02)
    connection.close()


def ask(connection: http.client.HTTPConnection, request: Request) -> str:
    connection.request("POST", request.path, request.body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    if response.status != 200:
        return f"{response.status} {answer['code']}"
    (caption,) = answer
    return RIGHT if request.caption and caption.startswith(request.caption) else f"wrong answer: {caption}"


def operate(address: str, models: list[str], record: Record, ended: threading.Event) -> None:
    """Stop and start models, one a second or so, and ask all of them how they are."""
    chance = random.Random(0)
    while not ended.wait(chance.uniform(0.2, 1.5)):
        model, action = chance.choice(models), chance.choice(["start", "stop", "stop"])
        connection = http.client.HTTPConnection(address, timeout=CLIENT_TIMEOUT_S)
        try:
            for method, path in [("POST", f"/api/models/{model}/{action}"), ("GET", f"/api/models/{model}/status")]:
                connection.request(method, path, None, {"Content-Type": "application/json"})
                response = connection.getresponse()
                response.read()
                if response.status != 200:
                    record.violations.append(f"{method} {path}: {response.status}")
            record.operations[action] += 1
        except (OSError, http.client.HTTPException) as error:
            record.violations.append(f"{action} {model}: {type(error).__name__}: {error}")
        finally:
            connection.close()


def sample(server: psutil.Process, record: Record, ended: threading.Event) -> None:
    """Note what the server's processes have, and which of them end, whether or not another takes their place.

    A model's process is left out: it does not live long here.
    """
    before = processes_of(server)
    is_last = False
    while not is_last:
        is_last = ended.wait(SAMPLE_INTERVAL_S)
        now = processes_of(server)
        gone = [name for name, process in before.items() if now.get(name) != process]
        record.violations += [f"the {name} ended (process {before[name].pid})" for name in gone]
        record.samples.append(usage(now))
        before = now


def usage(processes: Mapping[str, psutil.Process]) -> dict[tuple[str, str], float]:
    had: dict[tuple[str, str], float] = {}
    for name, process in processes.items():
        with suppress(psutil.Error):  # it has just ended, as the next look will tell
            had[name, "MiB"] = process.memory_info().rss / (1 << 20)
            had[name, "threads"] = process.num_threads()
            had[name, "files"] = process.num_fds() - n_files_of_regions(process.pid)
    return had


def n_files_of_regions(pid: int) -> int:
    """Return how many files are memory for pictures: more wherever more came at once than before, up to a bound."""
    n = 0
    for path in Path(f"/proc/{pid}/fd").glob("*"):
        with suppress(OSError):  # it is closed by now
            n += REGION in os.readlink(path)
    return n


def processes_of(server: psutil.Process) -> dict[str, psutil.Process]:
    """Return the processes that live as long as the server, by what they are."""
    found = {"master": server}
    for child in server.children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            command = " ".join(child.cmdline())
            if "core.engine_process" in command:
                # Parents come first. What the engine starts has its command line for a moment.
                found.setdefault("engine", child)
            elif "gunicorn" in command and child.ppid() == server.pid:
                found[f"web worker {child.pid}"] = child
    return found


def growth(record: Record) -> Iterator[tuple[str, str, float, float]]:
    """Yield what each process had in the run's second quarter and in its last one (medians)."""
    quarter = max(1, len(record.samples) // 4)
    early, late = record.samples[quarter : 2 * quarter], record.samples[-quarter:]
    for name, what in sorted({key for had in early + late for key in had}):
        before = [had[name, what] for had in early if (name, what) in had]
        after = [had[name, what] for had in late if (name, what) in had]
        if not before or not after:
            record.violations.append(f"the {name} did not live all the time")
            continue
        yield name, what, statistics.median(before), statistics.median(after)


@contextmanager
def running_server(
    folder: Path, n_workers: int, settings: Mapping[str, str] = SETTINGS
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start gunicorn as the repository configures it, yield it and its address when it answers, and see to its end."""
    address = f"127.0.0.1:{free_port()}"
    paths = os.pathsep.join(map(str, PLUGIN_PATH))
    environment = os.environ | settings | {"PYTHONPATH": paths, "LOG_PATH": str(folder / "log.txt")}
    options = ["-c", str(ROOT / "gunicorn.conf.py"), "-b", address, "-w", str(n_workers)]
    with (folder / "server.txt").open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", *options], cwd=folder, env=environment, stdout=output, stderr=output
        )
    try:
        wait_until_ready(server, address)
        yield server, address
    except Exception:
        print((folder / "server.txt").read_text()[-5000:])  # noqa: T201
        raise
    finally:  # of an impatient operator as well
        stop(server)


def wait_until_ready(server: subprocess.Popen[bytes], address: str) -> None:
    give_up_at = time.monotonic() + CLIENT_TIMEOUT_S
    while time.monotonic() < give_up_at and server.poll() is None:
        connection = http.client.HTTPConnection(address, timeout=CLIENT_TIMEOUT_S)
        try:
            connection.request("GET", "/api/tasks/list")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.02)
        finally:
            connection.close()
    raise TimeoutError(f"the server did not come up (exit status {server.poll()})")


def wait_until_all_answered(record: Record, models: list[str]) -> None:
    """Wait until all models are loaded: what the processes grow by until then is not to be measured."""
    give_up_at = time.monotonic() + CLIENT_TIMEOUT_S
    while silent := [model for model in models if model not in record.last_right]:
        if time.monotonic() >= give_up_at:
            record.violations += [f"{model} gave no right answer within {CLIENT_TIMEOUT_S:g} s" for model in silent]
            return
        time.sleep(0.02)


def note_silent_models(record: Record, models: list[str], last_s: float) -> None:
    """Tell which models gave no right answer in the last seconds: a refusal is allowed at any time, but not always."""
    since = time.monotonic() - last_s
    silent = [model for model in models if record.last_right.get(model, -math.inf) < since]
    record.violations += [f"{model} gave no right answer in the last {last_s:g} s" for model in silent]


def put_under_load(address: str, master: psutil.Process, record: Record, minutes: float, n_clients: int) -> None:
    ended, requests = threading.Event(), all_requests()
    models = sorted({request.model for request in requests})
    with ThreadPoolExecutor(n_clients + 2) as pool:
        try:
            work = [pool.submit(send, address, requests, record, ended, seed) for seed in range(n_clients)]
            wait_until_all_answered(record, models)
            work.append(pool.submit(operate, address, models, record, ended))
            work.append(pool.submit(sample, master, record, ended))
            ended.wait(60 * minutes)
            note_silent_models(record, models, max(60 * minutes / 4, RECOVERY_S))
        finally:  # of an impatient operator as well: the pool waits for its threads
            ended.set()
    record.violations += [f"a thread ended with {error!r}" for one in work if (error := one.exception())]


def soak(minutes: float, n_workers: int, n_clients: int) -> Record:
    """Put a server under load for ``minutes``, end it, and return what was seen."""
    record = Record()
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder), n_workers) as (server, address):
        master = psutil.Process(server.pid)
        put_under_load(address, master, record, minutes, n_clients)
        left = [master, *master.children(recursive=True)]
        server.terminate()
        if (status := server.wait(CLIENT_TIMEOUT_S)) != 0:
            record.violations.append(f"the server ended with status {status}")
        _, outlived = psutil.wait_procs(left, timeout=CLIENT_TIMEOUT_S)
        record.violations += [f"the process {process.pid} outlived the server" for process in outlived]
        kill(outlived)
    return record


def report(record: Record, minutes: float) -> str:
    n_requests = sum(counts.total() for counts in record.outcomes.values())
    operations = " and ".join(f"{n} times {action}" for action, n in sorted(record.operations.items()))
    lines = [f"{n_requests} requests in {minutes:g} minutes; meanwhile, {operations}", "", "how they ended"]
    for model, counts in sorted(record.outcomes.items()):
        lines += [f"  {model:14} {n:8}  {outcome}" for outcome, n in counts.most_common(8)]
    lines += ["", "what processes had in the second and in the last quarter"]
    for name, what, before, after in growth(record):
        lines.append(f"  {name:18} {what:8} {before:8.1f} {after:8.1f}")
        if after - before > ALLOWED_GROWTH[what]:
            record.violations.append(f"the {name} grew from {before:.1f} to {after:.1f} {what}")
    lines += ["", f"violations: {len(record.violations)}"]
    lines += [f"  {violation}" for violation in record.violations[:20]]
    return "\n".join(lines)


def main(arguments: Any = None) -> int:
    end_by_signals()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--clients", type=int, default=24)
    options = parser.parse_args(arguments)
    record = soak(options.minutes, options.workers, options.clients)
    print(report(record, options.minutes))  # noqa: T201
    return 1 if record.violations else 0


if __name__ == "__main__":
    sys.exit(main())
