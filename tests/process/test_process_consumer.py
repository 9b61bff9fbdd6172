"""Models in processes of their own: what dies there harms nobody else."""

from __future__ import annotations

import gc
import os
import signal
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from flask.testing import FlaskClient
from PIL import Image

from feature_extraction_server.core import torch_threads
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.errors import ModelLoadFailed, ModelUnavailable
from feature_extraction_server.core.jobs import Batch, Call, Job, Piece
from feature_extraction_server.core.model import State
from feature_extraction_server.core.model_process import ModelProcess
from feature_extraction_server.core.wire import Channel
from feature_extraction_server.flask.app import create_app
from tests.conftest import Server, encode_image, is_gone
from tests.waiting import wait_until

pytestmark = pytest.mark.process

WAIT_S = 20
MODEL = "fake_fragile"
PATH = f"/api/models/{MODEL}/tasks/image_captioning/features"
Build = Callable[..., Engine]
Plugin = Callable[[str, str, str], None]

# Its load waits while there is a certain file.
WAITS = """
import time
from pathlib import Path
consumer_type = "process_consumer"
def load_model():
    while Path({path!r}).exists():
        time.sleep(0.01)
def text_embedding(text, config):
    return [[1.0] for _ in text]
"""
LOCAL = """
from feature_extraction_server.core.checkpoints import Checkpoint
def add_settings(settings_manager):
    global some_checkpoint
    some_checkpoint = Checkpoint(settings_manager, "local", "owner/name")
def load_model():
    with some_checkpoint.loading():
        pass
def provenance():
    return {"checkpoint": some_checkpoint.name, "revision": some_checkpoint.revision}
"""
DIFFERS = """
import os
consumer_type = "process_consumer"
def load_model(): pass
def provenance():
    return {"checkpoint": "owner/name", "revision": "commit " + os.environ["MODEL_REPLICA"]}
def text_embedding(text, config):
    return [[1.0] for _ in text]
"""
TELLS_SHARE = """
from feature_extraction_server.core import torch_threads
def load_model():
    global share_at_load
    share_at_load = torch_threads.share()
def tell():
    return share_at_load, torch_threads.share()
"""


@pytest.fixture
def client(build: Build) -> FlaskClient:
    return create_app(build(RESULT_CHECK_INTERVAL="0.02")).test_client()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as executor:
        yield executor


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> list[ModelProcess]:
    """What has started a process since."""
    spawn, started = ModelProcess.spawn, list[ModelProcess]()

    def note(process: ModelProcess) -> None:
        spawn(process)
        started.append(process)

    monkeypatch.setattr(ModelProcess, "spawn", note)
    return started


@pytest.fixture
def gate(plugin: Plugin, tmp_path: Path) -> Path:
    """The file that the load of the model ``waits`` waits for to go."""
    path = tmp_path / "gate"
    plugin("models", "waits", WAITS.format(path=str(path)))
    return path


def jobs_of(*widths: int) -> list[Job]:
    pictures = [Image.new("RGB", (width, 9)) for width in widths]
    return [Job(Call("image_captioning", {"image": [one], "config": {}}, ("image",))) for one in pictures]


def run(process: ModelProcess, jobs: list[Job]) -> None:
    Batch(MODEL, process, [Piece(job, 0, 1) for job in jobs]).run()


def kill(pid: int) -> None:
    process = psutil.Process(pid)
    process.kill()
    wait_until(lambda: is_gone(process))


def wait_for(engine: Engine, model: str, state: State) -> None:
    engine.models[model].wait_for_state([state], time.monotonic() + WAIT_S)


def body(width: int) -> dict[str, str]:
    return {"image": encode_image(Image.new("RGB", (width, 9)))}


def ask(client: FlaskClient, width: int) -> Any:
    return client.post(PATH, json=body(width))


def status(client: FlaskClient, model: str = MODEL) -> dict[str, Any]:
    answer = client.get(f"/api/models/{model}/status").json
    assert answer is not None
    return dict(answer)


def test_the_model_runs_in_a_process_of_its_own_which_ends_with_it(client: FlaskClient) -> None:
    (caption,) = ask(client, 40).json
    (pid,) = status(client)["pids"]
    assert caption == f"width 40 in process {pid}"
    assert pid != os.getpid()

    client.post(f"/api/models/{MODEL}/stop")

    wait_until(lambda: status(client)["state"] == "stopped")
    assert not psutil.pid_exists(pid)
    assert status(client)["pids"] == []
    assert ask(client, 40).status_code == 200


@pytest.mark.parametrize(("width", "reason"), [(2, "exit status 3"), (3, "SIGSEGV")], ids=["os._exit", "segfault"])
def test_a_process_that_dies_costs_its_request_a_503_and_is_replaced(
    client: FlaskClient, width: int, reason: str
) -> None:
    ask(client, 40)
    (pid,) = status(client)["pids"]

    response = ask(client, width)

    assert response.status_code == 503
    assert response.json["code"] == "model_unavailable"
    assert reason in response.json["error"]
    assert ask(client, 40).status_code == 200
    assert status(client)["state"] == "running"
    assert status(client)["pids"] != [pid]


@pytest.mark.parametrize(("width", "reason"), [(5, "five pixels wide"), (6, "six pixels wide")], ids=["raise", "exit"])
def test_what_a_function_raises_is_its_requests_error_and_the_process_lives(
    client: FlaskClient, width: int, reason: str
) -> None:
    ask(client, 40)
    before = status(client)["pids"]

    response = ask(client, width)

    assert response.status_code == 500
    assert reason in response.json["error"]
    assert status(client)["pids"] == before


def test_a_model_that_hangs_is_a_504_and_its_process_is_replaced(build: Build) -> None:
    client = create_app(build(REQUEST_TIMEOUT="5", RESULT_CHECK_INTERVAL="0.02")).test_client()
    client.application.test_client().post(f"/api/models/{MODEL}/start")
    wait_until(lambda: status(client)["state"] == "running")
    (pid,) = status(client)["pids"]

    response = ask(client, 4)

    assert response.status_code == 504
    wait_until(lambda: not psutil.pid_exists(pid))
    wait_until(lambda: bool(status(client)["pids"]))
    assert ask(client, 40).status_code == 200


def test_a_process_that_dies_while_there_is_nothing_to_do_is_replaced_unnoticed(client: FlaskClient) -> None:
    ask(client, 40)
    (pid,) = status(client)["pids"]

    kill(pid)

    assert ask(client, 40).status_code == 200
    assert status(client)["pids"] != [pid]


@pytest.mark.parametrize(
    ("variable", "reason"), [("FAKE_FRAGILE_FAILS", "no weights here"), ("FAKE_FRAGILE_DIES", "exit status 7")]
)
def test_a_load_that_fails_is_a_503_with_the_reason(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, variable: str, reason: str
) -> None:
    monkeypatch.setenv(variable, "1")

    response = ask(client, 40)

    assert response.status_code == 503
    assert response.json["code"] == "model_load_failed"
    assert reason in response.json["error"]
    assert status(client)["state"] == "failed"
    assert psutil.Process().children() == []


def test_a_process_that_cannot_be_replaced_makes_the_model_fail_until_it_is_started_again(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(client, 40)
    with monkeypatch.context() as patch:
        patch.setenv("FAKE_FRAGILE_FAILS", "1")
        assert ask(client, 2).status_code == 503
        wait_until(lambda: status(client)["state"] == "failed")
        assert "no weights here" in status(client)["error"]

    assert ask(client, 40).status_code == 200


def test_replicas_share_the_queue_and_one_that_dies_leaves_the_others_at_work(
    build: Build, pool: ThreadPoolExecutor
) -> None:
    engine = build(MODEL_REPLICAS_FAKE_FRAGILE="3", MAX_BATCH_SIZE="1", RESULT_CHECK_INTERVAL="0.02")
    client = create_app(engine).test_client()
    ask(client, 40)
    assert len(set(status(client)["pids"])) == 3

    answers = [pool.submit(ask, create_app(engine).test_client(), 2 if n == 4 else 7) for n in range(10)]

    codes = [answer.result(WAIT_S).status_code for answer in answers]
    captions = {tuple(answer.result().json) for answer in answers if answer.result().status_code == 200}
    assert codes.count(200) == 9
    assert codes[4] == 503
    assert len(captions) >= 3
    wait_until(lambda: len(status(client)["pids"]) == 3)


def test_of_requests_that_share_a_call_only_the_one_that_kills_the_process_fails(
    client: FlaskClient, pool: ThreadPoolExecutor
) -> None:
    ask(client, 40)
    running = pool.submit(ask, client.application.test_client(), 7)
    wait_until(lambda: status(client)["running_jobs"] == 1)
    answers = [pool.submit(ask, client.application.test_client(), width) for width in (40, 41, 2, 42)]
    wait_until(lambda: status(client)["queue_depth"] == 4)

    assert running.result(WAIT_S).status_code == 200
    assert [answer.result(WAIT_S).status_code for answer in answers] == [200, 200, 503, 200]


def test_a_process_that_dies_again_while_it_loads_is_started_no_more(
    spawned: list[ModelProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(2, 40, 41, 42)
    process = ModelProcess(MODEL, 0, 0.05)
    process.load_model()
    monkeypatch.setenv("FAKE_FRAGILE_DIES", "1")

    run(process, jobs)

    errors = [job.future.exception(0) for job in jobs]
    assert [type(error) for error in errors] == [ModelLoadFailed] * 4
    assert len(set(map(id, errors))) == 4  # each is raised in another thread
    with pytest.raises(ModelLoadFailed, match="exit status 7"):
        process.replace()
    assert len(spawned) == 2  # the first one, and its only successor


def test_a_call_that_is_under_way_when_the_model_is_unloaded_starts_no_other_process(
    spawned: list[ModelProcess], pool: ThreadPoolExecutor
) -> None:
    jobs = jobs_of(7, 7)
    process = ModelProcess(MODEL, 0, 0.05)
    process.load_model()
    running = pool.submit(run, process, jobs)
    wait_until(lambda: jobs[0].times().batch_items == 2)

    process.unload_model()

    running.result(WAIT_S)
    assert [type(job.future.exception(0)) for job in jobs] == [ModelUnavailable] * 2
    assert len(spawned) == 1


def test_a_call_ends_when_another_file_has_got_the_descriptor_of_its_process(pool: ThreadPoolExecutor) -> None:
    (job,) = jobs_of(7)
    process = ModelProcess(MODEL, 0, 0.05)
    process.load_model()
    running = pool.submit(run, process, [job])
    wait_until(lambda: job.times().batch_items == 1)
    close = Channel.close

    def close_and_open(channel: Channel) -> None:
        close(channel)
        quiet.extend(socket.socketpair() for _ in range(8))

    quiet: list[tuple[socket.socket, socket.socket]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Channel, "close", close_and_open)
        process.unload_model()

    running.result(WAIT_S)
    assert isinstance(job.future.exception(0), ModelUnavailable)
    for one in quiet:
        for end in one:
            end.close()


def test_a_process_that_cannot_be_replaced_keeps_no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = jobs_of(2)
    picture = weakref.ref(job.batched["image"][0])
    process = ModelProcess(MODEL, 0, 0.05)
    process.load_model()
    assert process.pid is not None
    kill(process.pid)
    monkeypatch.setenv("FAKE_FRAGILE_DIES", "1")

    run(process, [job])
    assert isinstance(job.future.exception(0), ModelLoadFailed)
    del job

    wait_until(lambda: gc.collect() >= 0 and picture() is None)


def test_a_stop_ends_a_process_that_hangs_while_it_loads(build: Build, gate: Path) -> None:
    engine = build(RESULT_CHECK_INTERVAL="0.02")
    gate.touch()
    engine.start("waits")
    wait_for(engine, "waits", State.LOADING)

    engine.stop("waits")

    wait_for(engine, "waits", State.STOPPED)
    assert engine.status("waits")["counts"]["failed_loads"] == 0


def test_a_stop_ends_a_process_that_hangs_while_it_replaces_another(
    build: Build, gate: Path, spawned: list[ModelProcess], pool: ThreadPoolExecutor
) -> None:
    engine = build(RESULT_CHECK_INTERVAL="0.02", STOP_GRACE_PERIOD="0.1")
    engine.start("waits", wait=True)
    gate.touch()
    kill(engine.status("waits")["pids"][0])
    answer = pool.submit(engine.run, "text_embedding", "waits", {"text": "a"})
    wait_until(lambda: len(spawned) == 2)

    engine.stop("waits")

    with pytest.raises(ModelUnavailable):
        answer.result(WAIT_S)
    wait_for(engine, "waits", State.STOPPED)


def test_a_stop_lets_a_process_load_that_accepted_requests_wait_for(
    build: Build, gate: Path, pool: ThreadPoolExecutor
) -> None:
    engine = build(RESULT_CHECK_INTERVAL="0.02", STOP_GRACE_PERIOD="60")
    gate.touch()
    answer = pool.submit(engine.run, "text_embedding", "waits", {"text": "a"})
    wait_for(engine, "waits", State.LOADING)

    engine.stop("waits")
    time.sleep(0.1)  # in which it is asked several times whether it is still needed
    gate.unlink()

    assert answer.result(WAIT_S) == [1.0]


def test_a_process_is_not_replaced_by_one_with_other_files_of_a_local_checkpoint(
    plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin("models", "local", LOCAL)
    monkeypatch.setenv("LOCAL_CHECKPOINT", str(tmp_path / "weights"))
    weights = tmp_path / "weights" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_text("old")
    process = ModelProcess("local", 0, 0.05)
    process.load_model()
    (tmp_path / "weights" / ".git").mkdir()
    (tmp_path / "weights" / ".git" / "index").write_text("what no model reads")
    process.replace()
    weights.write_text("new")

    with pytest.raises(ModelLoadFailed, match="not what the process before had: the files have changed"):
        process.replace()

    assert process.pid is None


def test_processes_that_have_loaded_different_weights_do_not_serve_together(build: Build, plugin: Plugin) -> None:
    plugin("models", "differs", DIFFERS)
    engine = build(MODEL_REPLICAS_DIFFERS="2")

    with pytest.raises(ModelLoadFailed, match="different weights: the revision is commit 1, not commit 0"):
        engine.start("differs", wait=True)

    assert psutil.Process().children() == []


def test_a_process_has_the_share_of_the_cores_that_the_engine_has_for_it_but_loads_with_all(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin("models", "tells_share", TELLS_SHARE)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setattr(torch_threads, "_n_at_work", 4)
    process = ModelProcess("tells_share", 0, 0.05)
    process.load_model()

    shares = process.tell()

    process.unload_model()
    assert shares == (8, 2)


def test_stopping_lets_all_replicas_finish(build: Build, pool: ThreadPoolExecutor) -> None:
    engine = build(MODEL_REPLICAS_FAKE_FRAGILE="2", MAX_BATCH_SIZE="1")
    client = create_app(engine).test_client()
    ask(client, 40)
    answers = [pool.submit(ask, create_app(engine).test_client(), 7) for _ in range(6)]
    wait_until(lambda: status(client)["running_jobs"] == 2)

    client.post(f"/api/models/{MODEL}/stop")

    accepted = [answer.result(WAIT_S).status_code for answer in answers]
    assert accepted == [200] * 6
    wait_until(lambda: status(client)["state"] in ("stopped", "running"))  # a late request starts it again


def test_the_consumer_type_of_any_model_can_be_set(build: Build, picture: str) -> None:
    client = create_app(build(FAKE_ECHO_CONSUMER_TYPE="process_consumer")).test_client()

    answer = client.post("/api/models/fake_echo/tasks/image_captioning/features", json={"image": picture})

    assert answer.json == ["40x30 (255, 0, 0)"]
    assert status(client, "fake_echo")["consumer_type"] == "process_consumer"
    assert status(client, "fake_echo")["pids"] != [os.getpid()]


@pytest.mark.parametrize("width", [40, 4], ids=["idle", "hung"])
def test_the_processes_of_a_killed_engine_end(gunicorn: Callable[..., Server], width: int) -> None:
    server = gunicorn("--preload", "-k", "gthread", "--threads", "4")
    server.post(PATH, body(40))
    if width == 4:
        with ThreadPoolExecutor(1) as executor:
            executor.submit(server.post, PATH, body(4))
            wait_until(lambda: server.get(f"/api/models/{MODEL}/status").json()["running_jobs"] == 1)
            found = server.get(f"/api/models/{MODEL}/status").json()
            os.kill(found["engine_pid"], signal.SIGKILL)
    else:
        found = server.get(f"/api/models/{MODEL}/status").json()
        os.kill(found["engine_pid"], signal.SIGKILL)

    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in found["pids"]))
    assert server.post(PATH, body(40)).status_code == 200
