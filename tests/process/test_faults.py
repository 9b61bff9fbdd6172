"""Processes that are killed, models that break and servers that end, all of it under load."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from flask.testing import FlaskClient
from PIL import Image

from dev_server import ROOT
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.flask.app import create_app
from tests.conftest import Server, encode_image, is_gone
from tests.http.bad_requests import PNG
from tests.http.conftest import json_of
from tests.load import Load
from tests.waiting import at_once, wait_until

pytestmark = pytest.mark.process

StartServer = Callable[..., Server]
MakePlugin = Callable[[str, str, str], None]

CONFIGURED = ("-c", str(ROOT / "gunicorn.conf.py"))
NO_PRELOAD = ("--worker-class", "gthread", "--threads", "64", "--graceful-timeout", "45")
SLOW = "/api/models/fake_slow/tasks/image_captioning/features"
FRAGILE = "/api/models/fake_fragile/tasks/image_captioning/features"
ECHO = "/api/models/fake_echo/tasks/image_captioning/features"
DIED = "503 model_unavailable"

both_ways = pytest.mark.parametrize("options", [CONFIGURED, NO_PRELOAD], ids=["preload", "no preload"])


def picture(width: int) -> dict[str, str]:
    return {"image": encode_image(Image.new("RGB", (width, 9)))}


def status(server: Server, model: str) -> dict[str, Any]:
    answer: dict[str, Any] = server.get(f"/api/models/{model}/status").json()
    return answer


def engine_of(server: Server) -> psutil.Process:
    return psutil.Process(status(server, "fake_slow")["engine_pid"])


def all_of(server: Server) -> list[psutil.Process]:
    """Every process of a server: master, web workers, engine and what the engine has started."""
    master, engine = psutil.Process(server.process.pid), engine_of(server)
    return list({master, engine, *master.children(recursive=True), *engine.children(recursive=True)})


def private_directories(server: Server) -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"fes-*-{server.process.pid}-*"))


def shared_memory() -> set[str]:
    """Names of the shared memory of Python's programs and ours."""
    return {path.name for path in Path("/dev/shm").glob("*") if path.name.startswith(("psm_", "fes"))}


def wait_until_nothing_is_left(server: Server, processes: list[psutil.Process]) -> None:
    wait_until(lambda: all(is_gone(process) for process in processes), f"the end of {processes}")
    wait_until(lambda: not private_directories(server), "the end of the engine's directory")


# Processes that are killed


@both_ways
def test_killed_engine_costs_the_requests_that_it_had_a_503_and_the_next_ones_nothing(
    gunicorn: StartServer, options: tuple[str, ...]
) -> None:
    server = gunicorn(*options, "-w", "2", FAKE_SECONDS="0.1")
    with Load(server, SLOW) as load:
        load.wait_for_successes(16)
        engine, workers = engine_of(server), server.workers()

        engine.kill()

        load.wait_for_successes(32)
        next_engine = engine_of(server)
    assert load.labels().keys() == {"200", DIED}
    assert load.labels()[DIED] <= 16
    assert next_engine != engine
    assert server.workers() == workers
    assert len(private_directories(server)) == 1


def test_killed_process_of_a_model_costs_its_requests_a_503_and_its_neighbours_nothing(gunicorn: StartServer) -> None:
    server = gunicorn(*CONFIGURED, "-w", "2")
    with Load(server, FRAGILE, 8) as load, Load(server, SLOW, 8) as neighbours:
        load.wait_for_successes(8)
        neighbours.wait_for_successes(8)
        engine, workers = engine_of(server), server.workers()
        (pid,) = status(server, "fake_fragile")["pids"]

        psutil.Process(pid).kill()

        load.wait_for_successes(16)
        neighbours.wait_for_successes(16)
    assert load.labels().keys() <= {"200", DIED}
    assert load.labels()[DIED] <= 8
    assert neighbours.labels().keys() == {"200"}
    assert (engine_of(server), server.workers()) == (engine, workers)
    assert status(server, "fake_fragile")["pids"] != [pid]


def test_killed_web_worker_costs_its_own_connections_only(gunicorn: StartServer) -> None:
    server = gunicorn(*CONFIGURED, "-w", "2", FAKE_SECONDS="0.1")
    with Load(server, SLOW) as load:
        load.wait_for_successes(16)
        engine, workers = engine_of(server), server.workers()
        other, killed = sorted(workers, key=psutil.Process.num_fds)  # killed is the one with more connections

        killed.kill()

        wait_until(lambda: len(server.workers() - {killed}) == 2, "another worker")
        load.wait_for_successes(32)
    broken = {label: n for label, n in load.labels().items() if label.startswith("broken")}
    assert load.labels().keys() - broken.keys() == {"200"}
    assert 1 <= sum(broken.values()) <= 16
    assert other in server.workers()
    assert engine_of(server) == engine


@both_ways
def test_killed_master_takes_everything_along(gunicorn: StartServer, options: tuple[str, ...]) -> None:
    memory = shared_memory()
    server = gunicorn(*options, "-w", "2", FAKE_SECONDS="0.1")
    server.post(FRAGILE, picture(40))
    with Load(server, SLOW) as load:
        load.wait_for_successes(16)
        processes = all_of(server)
        assert len(processes) == 5

        server.process.kill()  # whose parent, the test, does not ask yet how it ended

        wait_until_nothing_is_left(server, processes)
    assert load.labels(lambda outcome: not outcome.label.startswith("broken")).keys() <= {"200", DIED}
    assert shared_memory() <= memory


# Models that take the engine along, or never answer: what a model without a process of its own can do


@pytest.mark.parametrize("width", [2, 3], ids=["os._exit", "segfault"])
def test_model_that_ends_the_engine_costs_503s_and_preloaded_models_come_back(
    gunicorn: StartServer, width: int, tmp_path: Path
) -> None:
    server = gunicorn(
        *CONFIGURED, FAKE_FRAGILE_CONSUMER_TYPE="single_thread_consumer", PRELOAD_MODELS="fake_slow", FAKE_SECONDS="0.1"
    )
    wait_until(lambda: status(server, "fake_slow")["state"] == "running")
    server.post(FRAGILE, picture(40))
    with Load(server, ECHO, 8, width=40) as load:
        load.wait_for_successes(8)
        engine = engine_of(server)

        answer = server.post(FRAGILE, picture(width))

        load.wait_for_successes(8)
    wait_until(lambda: (tmp_path / "log.txt").read_text().count("The model fake_slow is running") == 2)
    assert (answer.status_code, answer.json()["code"]) == (503, "model_unavailable")
    assert load.labels().keys() <= {"200", DIED}
    assert engine_of(server) != engine


def test_model_that_hangs_is_a_504_and_its_neighbours_never_notice(gunicorn: StartServer) -> None:
    server = gunicorn(
        *CONFIGURED,
        FAKE_FRAGILE_CONSUMER_TYPE="single_thread_consumer",
        REQUEST_TIMEOUT="1",
        STOP_GRACE_PERIOD="0.5",
        FAKE_LOAD_SECONDS="0",
    )
    server.post(FRAGILE, picture(40))
    server.post(SLOW, picture(40))
    with Load(server, SLOW, 4) as neighbours:
        neighbours.wait_for_successes(4)

        answers = at_once(4, lambda _: server.post(FRAGILE, picture(4)))
        later = server.post(FRAGILE, picture(40))

        neighbours.wait_for_successes(4)
    assert [answer.status_code for answer in (*answers, later)] == [504] * 5
    assert {answer.json()["code"] for answer in (*answers, later)} == {"deadline_exceeded"}
    assert neighbours.labels().keys() == {"200"}
    processes = all_of(server)
    assert server.stop() == 0
    wait_until_nothing_is_left(server, processes)


def test_model_that_takes_long_to_load_keeps_only_its_own_requests_waiting(gunicorn: StartServer) -> None:
    server = gunicorn(*CONFIGURED, FAKE_LOAD_SECONDS="3", REQUEST_TIMEOUT="1")
    wait_until(lambda: server.get("/api/models/fake_slow/status").ok, "the engine")

    first = server.post(SLOW, picture(40))

    assert (first.status_code, first.json()["code"]) == (504, "deadline_exceeded")
    assert status(server, "fake_slow")["state"] == "loading"
    assert server.post(ECHO, {"image": PNG}).status_code == 200
    wait_until(lambda: status(server, "fake_slow")["state"] == "running")
    assert server.post(SLOW, picture(40)).json()[0].endswith("load 1")


# Models in processes of their own that break their contract


def in_a_process(build: Callable[..., Engine], **settings: str) -> FlaskClient:
    return create_app(build(RESULT_CHECK_INTERVAL="0.02", **settings)).test_client()


def test_model_that_exhausts_its_memory_is_a_500_and_goes_on(build: Callable[..., Engine]) -> None:
    client = in_a_process(build)
    path = "/api/models/fake_hungry/tasks/image_captioning/features"
    fed = client.post(path, json=picture(40))

    starved = client.post(path, json=picture(2))

    assert fed.status_code == 200
    assert (starved.status_code, json_of(starved)["code"]) == (500, "model_error")
    assert "MemoryError" in json_of(starved)["error"]
    assert client.post(path, json=picture(40)).json == fed.json


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        pytest.param("[['a'], ['b']]", "2 results for 1 items", id="two results for one item"),
        pytest.param("[lambda: 'a']", "cannot leave its process", id="a function"),
        pytest.param("(['a'] for _ in image)", "cannot leave its process", id="a generator"),
        pytest.param("[[float('nan')]]", "contract", id="NaN"),
        pytest.param("[Odd()]", "contract", id="an object of a class of its own"),
        pytest.param("[Locked()]", "RuntimeError: not here", id="an object that can be made only there"),
    ],
)
def test_result_that_breaks_the_contract_across_processes_is_a_500(
    plugin: MakePlugin, build: Callable[..., Engine], result: str, reason: str
) -> None:
    source = f"""
import os
consumer_type = "process_consumer"
home = os.getpid()
def load_model(): pass
class Odd: pass
class Locked:
    def __reduce__(self): return unlock, (os.getpid(),)
def unlock(pid):
    if pid != os.getpid(): raise RuntimeError("not here")
def image_captioning(image, config):
    return {result} if image[0].width == 2 else [["fine"]]
"""
    plugin("models", "odd", source)
    client = in_a_process(build)
    path = "/api/models/odd/tasks/image_captioning/features"

    broken = client.post(path, json=picture(2))

    assert (broken.status_code, json_of(broken)["code"]) == (500, "model_error")
    assert reason in json_of(broken)["error"]
    assert client.post(path, json=picture(40)).json == ["fine"]


def test_result_that_cannot_be_read_in_the_web_worker_is_a_500_and_nothing_hangs(
    gunicorn: StartServer, tmp_path: Path
) -> None:
    model = tmp_path / "feature_extraction_server" / "models" / "fake_locked.py"
    model.parent.mkdir(parents=True)
    model.write_text(
        "import os\n"
        "def load_model(): pass\n"
        "class Locked:\n"
        "    def __reduce__(self): return unlock, (os.getpid(),)\n"
        "def unlock(pid):\n"
        "    if pid != os.getpid(): raise RuntimeError('not here')\n"
        "def image_captioning(image, config): return [Locked() for _ in image]\n"
    )
    server = gunicorn(*CONFIGURED)  # finds the model in its working directory

    answers = [server.post("/api/models/fake_locked/tasks/image_captioning/features", picture(40)) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [500, 500]
    assert server.post(ECHO, {"image": PNG}).status_code == 200


def test_load_that_fails_once_in_a_process_of_its_own_is_a_503_and_then_succeeds(
    plugin: MakePlugin, build: Callable[..., Engine], tmp_path: Path
) -> None:
    source = f"""
from pathlib import Path
consumer_type = "process_consumer"
tried = Path({str(tmp_path / "tried")!r})
def load_model():
    if not tried.exists():
        tried.touch()
        raise OSError("the disk is not there yet")
def image_captioning(image, config): return [["done"]] * len(image)
"""
    plugin("models", "late", source)
    client = in_a_process(build, LOAD_RETRY_DELAY="0")

    answers = [client.post("/api/models/late/tasks/image_captioning/features", json=picture(40)) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [503, 200]
    assert json_of(answers[0])["code"] == "model_load_failed"
    assert "the disk is not there yet" in json_of(answers[0])["error"]


# Servers that end, and that reload


@both_ways
def test_sigterm_under_load_lets_what_is_in_flight_finish_and_takes_no_more(
    gunicorn: StartServer, options: tuple[str, ...]
) -> None:
    memory = shared_memory()
    server = gunicorn(*options, "-w", "2", FAKE_SECONDS="0.3")
    server.post(FRAGILE, picture(40))
    with Load(server, SLOW) as load:
        load.wait_for_successes(16)
        processes = all_of(server)
        wait_until(lambda: status(server, "fake_slow")["running_jobs"] > 0)
        asked_to_end = time.monotonic()

        server.process.send_signal(signal.SIGTERM)

        assert server.process.wait(45) == 0
        wait_until_nothing_is_left(server, processes)
    earlier = load.labels(lambda outcome: outcome.begun < asked_to_end - 0.1)
    later = load.labels(lambda outcome: outcome.begun >= asked_to_end - 0.1)
    assert earlier.keys() == {"200"}
    assert {label for label in later if not label.startswith("broken")} <= {"200"}
    assert any(label.startswith("broken") for label in later)
    assert shared_memory() <= memory


@both_ways
def test_sighup_under_load_loses_no_request_and_keeps_the_models(
    gunicorn: StartServer, options: tuple[str, ...]
) -> None:
    server = gunicorn(*options, "-w", "2", FAKE_SECONDS="0.1")
    with Load(server, SLOW) as load:
        load.wait_for_successes(16)
        engine, workers = engine_of(server), server.workers()

        server.process.send_signal(signal.SIGHUP)

        wait_until(lambda: not workers & server.workers() and len(server.workers()) == 2, "other workers")
        load.wait_for_successes(16)
    assert load.labels().keys() == {"200"}
    assert engine_of(server) == engine
    assert status(server, "fake_slow")["state"] == "running"
