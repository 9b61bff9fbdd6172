"""One engine for all web workers: what they agree on, and what ends when."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
from PIL import Image

from feature_extraction_server.core.engine_client import EngineClient, private_directory
from feature_extraction_server.core.errors import DeadlineExceeded, ModelUnavailable
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.setup import set_up
from tests.conftest import Server, encode_image, is_gone, server_environment
from tests.waiting import wait_until

pytestmark = pytest.mark.process

WAIT_S = 20
CAPTION = "/api/tasks/image_captioning/models/fake_slow/features"
STATUS = "/api/models/fake_slow/status"
THREADS = ("-k", "gthread", "--threads", "16")
Gunicorn = Callable[..., Server]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as executor:
        yield executor


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for temporary files whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="near-") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def engine_of(server: Server) -> psutil.Process:
    return psutil.Process(server.get(STATUS).json()["engine_pid"])


def n_accepted(server: Server) -> int:
    status = server.get(STATUS).json()
    return int(status["running_jobs"]) + int(status["queue_depth"])


@pytest.mark.parametrize("preload", [("--preload",), ()], ids=["preload", "no preload"])
def test_all_workers_share_one_copy_of_a_model_and_one_truth_about_it(
    gunicorn: Gunicorn, picture: str, preload: tuple[str, ...]
) -> None:
    server = gunicorn("-w", "3", *preload)  # sync workers: each new connection may meet another one

    answers = [server.post(CAPTION, {"image": picture}).json()[0] for _ in range(12)]
    statuses = [server.get(STATUS).json() for _ in range(12)]

    assert [answer.split(", ")[1:] for answer in answers] == [[f"call {n + 1}", "load 1"] for n in range(12)]
    assert {status["state"] for status in statuses} == {"running"}
    assert len({status["engine_pid"] for status in statuses}) == 1

    server.post("/api/models/fake_slow/stop", {})
    wait_until(lambda: all(server.get(STATUS).json()["state"] == "stopped" for _ in range(6)))


def test_a_killed_engine_costs_its_requests_a_503_and_the_next_one_starts_another(
    gunicorn: Gunicorn, picture: str, pool: ThreadPoolExecutor
) -> None:
    server = gunicorn(*THREADS, FAKE_SECONDS="2")
    in_flight = [pool.submit(server.post, CAPTION, {"image": picture}) for _ in range(4)]
    wait_until(lambda: n_accepted(server) == 4)
    engine = engine_of(server)

    engine.kill()

    answers = [request.result(WAIT_S) for request in in_flight]
    assert [answer.status_code for answer in answers] == [503] * 4
    assert {answer.json()["code"] for answer in answers} == {"model_unavailable"}
    wait_until(lambda: is_gone(engine))  # until then, it may still take a request
    assert server.post(CAPTION, {"image": picture}).status_code == 200


def test_a_recycled_or_killed_worker_does_not_touch_the_engine(gunicorn: Gunicorn, picture: str) -> None:
    server = gunicorn(*THREADS, "--preload", "-w", "1")
    before = engine_of(server).pid
    server.post(CAPTION, {"image": picture})
    (worker,) = server.workers()

    worker.kill()
    wait_until(lambda: bool(server.workers() - {worker}))

    server.wait_until_ready()
    assert server.get(STATUS).json()["state"] == "running"
    assert engine_of(server).pid == before


@pytest.mark.parametrize("what", ["", "engine"], ids=["directory", "socket"])
def test_one_engine_is_left_when_a_clean_up_of_temporary_files_has_taken_what_it_is_found_by(
    gunicorn: Gunicorn, picture: str, pool: ThreadPoolExecutor, what: str
) -> None:
    server = gunicorn(*THREADS, "-w", "2", FAKE_SECONDS="0.5")
    server.post(CAPTION, {"image": picture})
    taken = private_directory(server.process.pid) / what

    shutil.rmtree(taken) if taken.is_dir() else taken.unlink()
    answers = list(pool.map(lambda _: server.post(CAPTION, {"image": picture}), range(16)))

    assert {answer.status_code for answer in answers} == {200}
    wait_until(lambda: len(server.engines()) == 1, "one engine")
    for _ in range(8):
        assert server.post(CAPTION, {"image": picture}).status_code == 200
    assert len(server.engines()) == 1
    assert taken.exists()


def test_a_directory_for_temporary_files_may_have_a_longer_path_than_a_socket(
    gunicorn: Gunicorn, picture: str, tmp_path: Path
) -> None:
    far = tmp_path / ("directory" * 12)
    far.mkdir()
    server = gunicorn(*THREADS, "-w", "2", TMPDIR=str(far))

    answers = [server.post(CAPTION, {"image": picture}) for _ in range(4)]

    assert {answer.status_code for answer in answers} == {200}
    assert len(server.engines()) == 1


@pytest.mark.parametrize("preload", [("--preload",), ()], ids=["preload", "no preload"])
@pytest.mark.parametrize(
    ("how", "status"),
    [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGQUIT, 0), (signal.SIGKILL, -signal.SIGKILL)],
    ids=["SIGTERM", "SIGINT", "SIGQUIT", "SIGKILL"],
)
def test_all_processes_and_files_go_with_the_server(
    gunicorn: Gunicorn, picture: str, preload: tuple[str, ...], how: signal.Signals, status: int
) -> None:
    server = gunicorn("-w", "2", *preload)
    server.post(CAPTION, {"image": picture})
    started = psutil.Process(server.process.pid).children(recursive=True)
    engine = engine_of(server)
    directories = list(Path(tempfile.gettempdir()).glob(f"fes-*-{server.process.pid}-*"))

    server.process.send_signal(how)

    assert server.process.wait(WAIT_S) == status
    assert len(started) == 3
    assert len(directories) == 1
    wait_until(lambda: is_gone(engine))
    if how is not signal.SIGKILL:  # of which Gunicorn's workers take note every 15 s
        wait_until(lambda: all(map(is_gone, started)))
    wait_until(lambda: not directories[0].exists())


def test_a_request_in_flight_is_answered_when_the_whole_group_is_asked_to_end(
    gunicorn: Gunicorn, picture: str, pool: ThreadPoolExecutor
) -> None:
    server = gunicorn(*THREADS, "--preload", FAKE_SECONDS="1")
    request = pool.submit(server.post, CAPTION, {"image": picture})
    wait_until(lambda: server.get(STATUS).json()["running_jobs"] > 0)
    engine = engine_of(server)

    engine.terminate()  # as a service manager does to every process
    server.process.terminate()

    assert request.result(WAIT_S).status_code == 200
    wait_until(lambda: is_gone(engine))


@pytest.mark.parametrize(
    "size", [(40, 30), (400, 400)], ids=["small picture", "picture larger than the socket's buffer"]
)
def test_a_frozen_engine_is_a_504_not_a_hang(gunicorn: Gunicorn, size: tuple[int, int]) -> None:
    server = gunicorn(*THREADS, REQUEST_TIMEOUT="1")
    body = {"image": encode_image(Image.new("RGB", size))}
    wait_until(lambda: server.post(CAPTION, body).ok, "the model")
    engine = engine_of(server)

    engine.suspend()
    try:
        answer = server.post(CAPTION, body, timeout=WAIT_S)
    finally:
        engine.resume()

    assert answer.status_code == 504
    assert server.post(CAPTION, body).status_code == 200


def test_a_frozen_engine_that_has_no_room_for_another_connection_is_a_504(
    gunicorn: Gunicorn, pool: ThreadPoolExecutor
) -> None:
    server = gunicorn(*THREADS, REQUEST_TIMEOUT="1")
    body = {"image": encode_image(Image.new("RGB", (4, 3)))}
    wait_until(lambda: server.post(CAPTION, body).ok, "the model")
    engine = engine_of(server)
    address = str(Path(engine.cmdline()[-2]) / "engine")

    engine.suspend()
    with ExitStack() as waiting:
        waiting.callback(engine.resume)
        with suppress(BlockingIOError):
            while True:
                client = waiting.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(address)
        answers = list(pool.map(lambda _: server.post(CAPTION, body, timeout=WAIT_S), range(3)))

    assert [answer.status_code for answer in answers] == [504] * 3
    assert server.post(CAPTION, body).status_code == 200
    assert server.engines() == {engine}


@pytest.mark.parametrize("preload", [("--preload",), ()], ids=["preload", "no preload"])
def test_preloaded_models_start_at_boot(gunicorn: Gunicorn, preload: tuple[str, ...]) -> None:
    server = gunicorn("-w", "2", *preload, PRELOAD_MODELS="fake_slow, fake_echo")

    wait_until(lambda: server.get(STATUS).json()["state"] == "running")
    wait_until(lambda: server.get("/api/models/fake_echo/status").json()["state"] == "running")


@pytest.mark.parametrize("preload", [("--preload",), ()], ids=["preload", "no preload"])
def test_preloaded_models_start_again_when_the_engine_has_died(
    gunicorn: Gunicorn, preload: tuple[str, ...], tmp_path: Path
) -> None:
    server = gunicorn("-w", "2", *preload, PRELOAD_MODELS="fake_slow")
    log = tmp_path / "log.txt"
    wait_until(lambda: server.get(STATUS).json()["state"] == "running")

    engine_of(server).kill()

    wait_until(lambda: log.read_text().count("The model fake_slow is running") == 2)  # without any request


@pytest.mark.parametrize(("server_kind", "options"), [("gunicorn", ["--preload"]), ("dev_server", [])])
def test_a_preloaded_model_that_cannot_be_loaded_yet_is_loaded_when_it_can(
    request: pytest.FixtureRequest,
    server_kind: str,
    options: list[str],
    plugin: Callable[[str, str, str], None],
    tmp_path: Path,
) -> None:
    weights = tmp_path / "weights"
    plugin("models", "late", f"def load_model(): open({str(weights)!r}).close()\ndef image_captioning(image): pass\n")
    path = os.pathsep.join([str(tmp_path / "plugins"), server_environment(tmp_path)["PYTHONPATH"]])
    start: Gunicorn = request.getfixturevalue(server_kind)
    server = start(*options, PRELOAD_MODELS="late", LOAD_RETRY_DELAY="0.1", PYTHONPATH=path)
    wait_until(lambda: server.get("/api/models/late/status").json()["counts"]["failed_loads"] > 1)
    before = server.get("/health/ready")

    weights.touch()

    wait_until(lambda: server.get("/health/ready").status_code == 200)
    assert before.status_code == 503


def test_tensors_leave_the_engine_as_numbers_and_no_torch_enters_a_web_worker(
    gunicorn: Gunicorn, picture: str, tmp_path: Path
) -> None:
    model = tmp_path / "feature_extraction_server" / "models" / "fake_tensor.py"
    model.parent.mkdir(parents=True)
    model.write_text(
        "def load_model():\n"
        "    global torch\n"
        "    import torch\n"
        "def zero_shot_image_classification(image, classes, config):\n"
        "    return torch.full((len(image), len(classes)), 0.5, dtype=torch.bfloat16)\n"
    )
    server = gunicorn(*THREADS)  # finds the model in its working directory

    answer = server.post(
        "/api/tasks/zero_shot_image_classification/models/fake_tensor/features", {"image": picture, "classes": ["a"]}
    )

    assert answer.json() == [0.5]
    (worker,) = server.workers()
    assert "libtorch" not in Path(f"/proc/{worker.pid}/maps").read_text()


def test_errors_cross_the_processes_whole(gunicorn: Gunicorn, picture: str) -> None:
    server = gunicorn(*THREADS)

    answers = [
        server.post("/api/tasks/image_captioning/models/fake_broken/features", {"image": picture}) for _ in range(2)
    ]

    assert [answer.status_code for answer in answers] == [503, 503]
    assert "no weights here" in answers[1].json()["error"]
    assert "Retry-After" in answers[1].headers


@pytest.mark.parametrize("mode", [0o755, 0o770])
def test_a_directory_that_others_can_enter_is_refused(near: Path, mode: int) -> None:
    private_directory(os.getpid()).chmod(mode)

    with pytest.raises(PermissionError, match="only this user"):
        private_directory(os.getpid())


def test_a_worker_that_runs_as_another_user_than_the_master_says_so(
    near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SettingsManager({"LOG_PATH": str(near / "log.txt")}, near / ".env")
    registry, server_settings, _ = set_up(settings)
    client = EngineClient(registry, server_settings, owner_pid=os.getpid())
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)

    with pytest.raises(ModelUnavailable, match=r"another user .* in place of its option --user"):
        client.start("fake_echo")


def test_a_request_waits_no_longer_than_it_may_while_others_start_the_engine(
    near: Path, pool: ThreadPoolExecutor
) -> None:
    settings = SettingsManager({"LOG_PATH": str(near / "log.txt"), "REQUEST_TIMEOUT": "0.2"}, near / ".env")
    registry, server_settings, _ = set_up(settings)
    client = EngineClient(registry, server_settings, owner_pid=os.getpid())

    with (client.shared_directory / "lock").open("w") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        late = pool.submit(client.status, "fake_echo").exception(WAIT_S)

    assert isinstance(late, DeadlineExceeded)


def test_the_directory_of_a_dead_server_is_cleared_away(near: Path) -> None:
    stale = near / f"fes-{os.getuid()}-{os.getpid()}-1"
    stale.mkdir()

    private_directory(os.getpid())

    assert not stale.exists()


def test_the_directory_of_a_server_in_another_container_stays(near: Path) -> None:
    other = near / f"fes-{os.getuid()}-{os.getpid()}-1"
    other.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(other / "engine"))
        listener.listen()

        private_directory(os.getpid())

        assert other.exists()
