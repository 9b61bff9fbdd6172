"""Measure models on a Ray cluster of one node on this machine, and write the tables to RAY.md.

    python benchmarks/ray_cluster.py                        # all: ten minutes
    python benchmarks/ray_cluster.py --parts scaling        # one of them; the others' numbers are kept
    python benchmarks/ray_cluster.py --parts scaling --batches 1 4

* ``overhead``: a model that does nothing, in the engine and on Ray.
* ``scaling``: a model that waits 50 ms a call, with 1, 2 and 4 replicas, in calls of several sizes.
* ``images``: batches of pictures, by this server and by Ray Serve's own HTTP front before the same replicas.

What it finds lies in ``capacity.json``, which ``capacity.py`` reads.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil

ROOT: Final = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.bench import all_of, end_by_signals, family, free_port, has_argument, kill, stop, used_s  # noqa: E402 - the path is set above
from benchmarks.capacity import markdown  # noqa: E402
from benchmarks.load import Measurement, choose_generator, measure  # noqa: E402
from benchmarks.workloads import MeanColour  # noqa: E402

BENCHMARKS: Final = ROOT / "benchmarks"
FINDINGS: Final = BENCHMARKS / "capacity.json"
PLUGINS: Final = ("apis-base_api", "apis-monitoring_api", "consumers-ray")
TEXT: Final = "The quick brown fox jumps over the lazy dog."
REQUEST: Final = json.dumps({"text": TEXT})
REPLICAS: Final = (1, 2, 4)
WAIT_MS: Final = 50


class Way(NamedTuple):
    """How replicas are kept busy: enough connections for each that full calls wait for it."""

    max_batch_size: int
    texts_a_request: int
    connections: int  # a replica


WAYS: Final = (Way(1, 1, 4), Way(4, 1, 12), Way(32, 1, 96), Way(32, 32, 4))
IMAGES_A_REQUEST: Final = 8
START_TIMEOUT_S: Final = 90
WARM_UP_S: Final = 2
IDLE_S: Final = 10
#: Not 127.0.0.1, in whose place Ray takes another address of the machine.
HEAD_IP: Final = "127.0.0.2"


class Cluster:
    """A Ray cluster of one node, which listens on the loopback interface alone."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="r-", dir="/tmp"))
        self.address = f"{HEAD_IP}:{free_port()}"
        path = [ROOT / "feature_extraction_server-core", BENCHMARKS / "plugins", ROOT]
        path += [ROOT / "plugins" / f"feature_extraction_server-{name}" for name in PLUGINS]
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        self.environment = inherited | {
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "LOG_PATH": str(self.folder / "log.txt"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=8"]
        command += ["--include-dashboard=false", f"--node-ip-address={HEAD_IP}", "--object-store-memory=200000000"]
        command += [f"--port={self.address.rpartition(':')[2]}", f"--temp-dir={self.folder}"]
        self._node = self.spawn(command)
        try:
            self._wait_until_started()
        except BaseException:
            self.close()
            raise

    def _wait_until_started(self) -> None:
        until = time.monotonic() + START_TIMEOUT_S
        while "Ray runtime started" not in self.log():
            if self._node.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"ray_cluster.py: the cluster did not start\n{self.log()[-3000:]}")
            time.sleep(0.2)

    def spawn(self, command: Sequence[str], **more: Any) -> subprocess.Popen[bytes]:
        settings = more.pop("settings", {})
        with (self.folder / "out.txt").open("ab") as log:
            options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log} | more
            options["start_new_session"] = True  # by which stop() finds what is left of it
            return subprocess.Popen(command, cwd=self.folder, env=self.environment | settings, **options)

    def log(self) -> str:
        return (self.folder / "out.txt").read_text(errors="replace")

    def used_s(self, server: Server) -> float:
        """Return the processor time of all its processes and of all of a server."""
        return used_s([*family(psutil.Process(self._node.pid)), *family(psutil.Process(server.process.pid))])

    def close(self) -> None:
        kill(all_of(self._node))  # asked to end, Ray would take half a minute
        self._node.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Server:
    """A server of ours with one web worker and the engine."""

    def __init__(self, cluster: Cluster, model: str, task: str, **settings: str) -> None:
        self.port = free_port()
        self.model = model
        self.path = f"/api/models/{model}/tasks/{task}/features"
        command = [
            sys.executable,
            "-m",
            "gunicorn",
            "-c",
            str(ROOT / "gunicorn.conf.py"),
            "-b",
            f"127.0.0.1:{self.port}",
        ]
        self.process = cluster.spawn(command, settings={"RAY_ADDRESS": cluster.address} | settings)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def get(self, path: str) -> Any:
        return json.loads(self.text(path))

    def text(self, path: str) -> str:
        with urllib.request.urlopen(self.url(path), timeout=30) as answer:
            return str(answer.read().decode())

    def wait_for_replicas(self, n: int) -> None:
        """Start the model, and wait until it runs as often as that."""
        until = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until:
            time.sleep(0.2)
            try:
                status = self.get(f"/api/models/{self.model}/status")
                if status["state"] == "stopped":
                    urllib.request.urlopen(self.url(f"/api/models/{self.model}/start"), b"{}", timeout=30).close()
                if status["state"] == "failed":
                    raise SystemExit(f"ray_cluster.py: {status['error']}")
                running = [one for one in status.get("replicas") or [] if one["state"] == "running"]
                if status["state"] == "running" and len(running or [1]) >= n:
                    return
            except OSError:
                pass
        raise SystemExit(f"ray_cluster.py: {n} replicas of {self.model} were not there within {START_TIMEOUT_S} s")

    def stop_model(self) -> None:
        """Delete the model from the cluster, so that the next server may ask for other replicas."""
        until = time.monotonic() + START_TIMEOUT_S
        while (status := self.get(f"/api/models/{self.model}/status"))["state"] != "stopped":
            # What connections that are gone have asked for would start it again.
            if status["state"] == "running" and not status["queue_depth"] + status["running_jobs"]:
                urllib.request.urlopen(self.url(f"/api/models/{self.model}/stop"), b"{}", timeout=30).close()
            if time.monotonic() > until:
                raise SystemExit(f"ray_cluster.py: {self.model} did not stop within {START_TIMEOUT_S} s")
            time.sleep(0.2)

    def used_s(self) -> tuple[float, float]:
        """Return the processor time of the web worker and of the engine with the process that speaks with Ray."""
        engine = psutil.Process(self.get(f"/api/models/{self.model}/status")["engine_pid"])
        engines = family(engine)
        web = [one for one in family(psutil.Process(self.process.pid)) if one not in engines]
        return used_s(web), used_s([engine, *(one for one in engines if has_argument(one, "driver"))])

    def calls(self) -> tuple[float, float]:
        """Return how many calls there were of the model, and for how many requests."""
        text = self.text("/metrics")
        count, total = (re.findall(rf"^fes_batch_items_{part}{{.*?}} (\S+)$", text, re.M) for part in ("count", "sum"))
        return sum(map(float, count)), sum(map(float, total))


@contextmanager
def cluster() -> Iterator[Cluster]:
    one = Cluster()
    try:
        yield one
    except BaseException:
        sys.stderr.write(one.log()[-3000:])
        raise
    finally:
        one.close()


@contextmanager
def serving(cluster: Cluster, model: str, task: str, n_replicas: int, **settings: str) -> Iterator[Server]:
    """A server whose model has as many replicas on the cluster; 0: it runs in the engine."""
    settings |= {"DEFAULT_CONSUMER_TYPE": "ray_consumer"} if n_replicas else {}
    settings |= {name: str(max(1, n_replicas)) for name in ("RAY_MIN_REPLICAS", "RAY_MAX_REPLICAS")}
    server = Server(cluster, model, task, **settings)
    try:
        server.wait_for_replicas(n_replicas)
        yield server
        server.stop_model()
    finally:
        stop(server.process)


@contextmanager
def front(cluster: Cluster) -> Iterator[tuple[Server, str]]:
    """A server, and the URL of Ray Serve's own front, which has to be there before it."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.peers.ray_front", cluster.address, str(port)]
    command += ["fes_mean_colour_224", "mean_colour"]
    process = cluster.spawn(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdout.readline()
        with serving(cluster, "mean_colour_224", "mean_colour", 1) as server:
            process.stdin.write(b"\n")
            process.stdin.flush()
            process.stdout.readline()
            yield server, f"http://127.0.0.1:{port}/predict"
    finally:
        stop(process)


# What is measured


def overhead(seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for place, n_replicas in (("engine", 0), ("ray", 1)):
        with cluster() as ray, serving(ray, "noop", "text_echo", n_replicas) as server:
            idle_s = ray.used_s(server)
            time.sleep(IDLE_S)
            idle_cores = found[f"{place}_idle_cores"] = (ray.used_s(server) - idle_s) / IDLE_S
            for connections in (1, 32):
                (web_s, engine_s), (calls, items) = server.used_s(), server.calls()
                all_s, began = ray.used_s(server), time.monotonic()
                one = load(server.url(server.path), REQUEST, connections, seconds)
                (web_after_s, engine_after_s), (calls_after, items_after) = server.used_s(), server.calls()
                busy_s = ray.used_s(server) - all_s - idle_cores * (time.monotonic() - began)
                n = items_after - items
                found[f"{place}_{connections}"] = vars(one) | {
                    "web_ms": 1e3 * (web_after_s - web_s) / n,
                    "engine_ms": 1e3 * (engine_after_s - engine_s) / n,
                    "all_ms": 1e3 * busy_s / n,
                    "requests_a_call": n / (calls_after - calls),
                }
    return found


def scaling(seconds: float, batches: Sequence[int]) -> list[dict[str, Any]]:
    found = []
    with cluster() as ray:
        for way in (way for way in WAYS if way.max_batch_size in batches):
            body = json.dumps({"text": way.texts_a_request * [TEXT]}) if way.texts_a_request > 1 else REQUEST
            for n_replicas in REPLICAS:
                connections = way.connections * n_replicas
                settings = {"MAX_BATCH_SIZE": str(way.max_batch_size)}
                with serving(ray, "waits_50_ms", "text_echo", n_replicas, **settings) as server:
                    (calls, items), before_s, began = server.calls(), ray.used_s(server), time.monotonic()
                    one = load(server.url(server.path), body, connections, seconds)
                    busy_s, passed_s = ray.used_s(server) - before_s, time.monotonic() - began
                    calls_after, items_after = server.calls()
                found.append({"replicas": n_replicas} | way._asdict() | {"connections": connections} | vars(one))
                found[-1]["items_a_call"] = (items_after - items) / (calls_after - calls)
                found[-1]["cores_busy"] = busy_s / passed_s
                sys.stderr.write(f"{json.dumps(found[-1])}\n")
    return found


def images(seconds: float) -> dict[str, Any]:
    pictures = [body["image"] for body in MeanColour.bodies()]
    batch = json.dumps({"image": (pictures * IMAGES_A_REQUEST)[:IMAGES_A_REQUEST]})
    found: dict[str, Any] = {}
    with cluster() as ray, front(ray) as (server, url):
        for connections in (1, 4):
            found[f"server_{connections}"] = vars(load(server.url(server.path), batch, connections, seconds))
            found[f"front_{connections}"] = vars(load(url, batch, connections, seconds))
    return found


def load(url: str, body: str, connections: int, seconds: float) -> Measurement:
    measure(choose_generator(), url, [body], connections, WARM_UP_S)
    return measure(choose_generator(), url, [body], connections, seconds)


def _way_of(point: dict[str, Any]) -> tuple[int, ...]:
    return point["max_batch_size"], point["texts_a_request"], point["replicas"]


PARTS: Final[dict[str, Callable[..., Any]]] = {"overhead": overhead, "scaling": scaling, "images": images}


# What is written


def costs(found: dict[str, Any]) -> dict[str, Any]:
    """Return what a request and a call cost, for ``capacity.py``, of what was measured of a model that does nothing."""
    alone, together, here = found["ray_1"], found["ray_32"], found["engine_1"]
    # The engine's part is engine_ms a request and call_ms a call: two measurements, two unknowns.
    calls = 1 / together["requests_a_call"]
    call_ms = max(0.0, (alone["engine_ms"] - together["engine_ms"]) / (1 - calls)) if calls < 1 else 0.0
    way_ms = alone["p50_ms"] - here["p50_ms"] - call_ms
    numbers = {
        "web_ms": together["web_ms"],
        "engine_ms": max(0.0, alone["engine_ms"] - call_ms),
        "call_ms": call_ms,
        "network_ms": max(0.0, way_ms),
    }
    return {name: round(value, 3) for name, value in numbers.items()}


def machine_of(found: dict[str, Any]) -> dict[str, float]:
    """Return what else takes the cores of a machine that servers and replicas share, for ``capacity.py``.

    ``idle_cores`` are busy without any request; ``remote_ms`` is what a call takes elsewhere than in the server.
    """
    alone = found["ray_1"]
    remote_ms = max(0.0, alone["all_ms"] - alone["web_ms"] - alone["engine_ms"])
    numbers = {"cores": float(os.cpu_count() or 1), "idle_cores": found["ray_idle_cores"], "remote_ms": remote_ms}
    return {name: round(value, 3) for name, value in numbers.items()}


def tables(ray: dict[str, Any]) -> list[str]:
    """Return the tables of RAY.md, of the parts that were measured."""
    lines: list[str] = []
    if found := ray.get("overhead"):
        lines += ["", "## A job's overhead", ""]
        head = ["Connections", "Model", "Requests/s", "Median ms", "99 % ms", "Requests a call", "Errors"]
        rows = []
        for n in (1, 32):
            for key, title in (("engine", "in the engine"), ("ray", "on Ray")):
                one = found[f"{key}_{n}"]
                rows.append([f"{n}", title, *_told(one), f"{one['requests_a_call']:.1f}", f"{one['n_errors']}"])
            here, there = found[f"engine_{n}"], found[f"ray_{n}"]
            more = [f"{there[key] - here[key]:+.2f}" for key in ("p50_ms", "p99_ms")]
            rows.append([f"{n}", "difference", "", *more, "", ""])
        lines += markdown(head, rows)
    if found := ray.get("scaling"):
        lines += ["", "## More replicas of a model that waits 50 ms a call", ""]
        head = ["Items a call, at most", "Items a request", "Replicas", "Connections", "Requests/s", "Median ms"]
        head += ["99 % ms", "Items a call", "Cores busy", "Of linear"]
        rows = []
        for one in found:
            way = {key: one[key] for key in ("max_batch_size", "texts_a_request")}
            first = next(o for o in found if o["replicas"] == 1 and way.items() <= o.items())
            linear = one["requests_per_s"] / one["replicas"] / first["requests_per_s"]
            numbers = [*map(str, way.values()), f"{one['replicas']}", f"{one['connections']}"]
            rows.append([*numbers, *_told(one), *(f"{one[key]:.1f}" for key in ("items_a_call", "cores_busy"))])
            rows[-1].append(f"{linear:.2f}")
        lines += markdown(head, rows)
    if found := ray.get("images"):
        lines += ["", f"## Batches of {IMAGES_A_REQUEST} pictures", ""]
        rows = [
            [f"{n}", title, *_told(found[f"{key}_{n}"]), f"{found[f'{key}_{n}']['n_errors']}"]
            for n in (1, 4)
            for key, title in (("server", "this server"), ("front", "Ray Serve's front"))
        ]
        lines += markdown(["Connections", "By", "Requests/s", "Median ms", "99 % ms", "Errors"], rows)
    return lines


def _told(one: dict[str, Any]) -> list[str]:
    return [f"{one[key]:.1f}" for key in ("requests_per_s", "p50_ms", "p99_ms")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    sizes = sorted({way.max_batch_size for way in WAYS})
    parser.add_argument("--batches", nargs="+", type=int, choices=sizes, default=sizes, help="of scaling")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    options = parser.parse_args(arguments)
    end_by_signals()
    known: dict[str, Any] = json.loads(FINDINGS.read_text()) if FINDINGS.exists() else {}
    ray = known.setdefault("ray", {})
    for part in options.parts:
        if part == "scaling":
            kept = [one for one in ray.get(part, []) if one["max_batch_size"] not in options.batches]
            ray[part] = sorted(kept + scaling(options.seconds, options.batches), key=_way_of)
        else:
            ray[part] = PARTS[part](options.seconds)
        known["source"] = f"by ray_cluster.py on {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, for all processes"
        if "overhead" in ray:
            known["costs"] = {"curve_ms": {"1": WAIT_MS, "32": WAIT_MS}} | costs(ray["overhead"])
            known["machine"] = machine_of(ray["overhead"])
        known["measured"] = [one for one in ray.get("scaling", []) if one["texts_a_request"] == 1]
        FINDINGS.write_text(json.dumps(known, indent=1) + "\n")
    page = BENCHMARKS / "RAY.md"
    head = page.read_text().split("## Measured", 1)[0] if page.exists() else "# On a Ray cluster\n\n"
    page.write_text(head + "\n".join(["## Measured", "", known["source"], *tables(ray), ""]))


if __name__ == "__main__":
    main()
