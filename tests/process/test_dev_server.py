"""The development server as a process: from a plain checkout to its end, and what start-up costs."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dev_server import ROOT
from tests.conftest import Server, free_port, server_environment
from tests.http.bad_requests import CAPTION, PNG
from tests.waiting import at_once

pytestmark = pytest.mark.process

StartServer = Callable[..., Server]

SLOW = "/api/tasks/image_captioning/models/fake_slow/features"


def test_plain_checkout_starts_from_any_folder(tmp_path: Path) -> None:
    environment = server_environment(tmp_path)
    del environment["PYTHONPATH"]
    port = free_port()
    command = [sys.executable, str(ROOT / "dev_server.py"), "--host", "127.0.0.1", "--port", str(port)]
    server = Server(command, port, tmp_path, environment)
    try:
        tasks = server.wait_until_ready().get("/api/tasks/list").json()
    finally:
        status = server.stop()

    assert "image_captioning" in tasks
    assert "fake_shout" not in tasks
    assert status == 0


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=lambda sent: sent.name)
def test_signal_ends_the_server_and_all_it_started(dev_server: StartServer, sent: signal.Signals) -> None:
    server = dev_server()
    server.post(CAPTION, {"image": PNG})
    started = psutil.Process(server.process.pid).children(recursive=True)

    server.process.send_signal(sent)

    assert server.process.wait(30) == 0
    assert psutil.wait_procs(started, timeout=30)[1] == []
    assert "Traceback" not in server.log()


def test_setting_on_the_command_line_is_in_force(dev_server: StartServer) -> None:
    server = dev_server("--default-task", "image_captioning", "--default-model-image-captioning", "fake_echo")

    assert server.post("/extract", {"image": PNG}).json() == ["40x30 (255, 0, 0)"]


def test_setting_on_the_command_line_reaches_a_model_in_a_process_of_its_own(dev_server: StartServer) -> None:
    server = dev_server("--fake-slow-consumer-type", "process_consumer", "--fake-seconds", "0.25")

    server.post("/api/models/fake_slow/tasks/image_captioning/features", {"image": PNG})

    (pid,) = server.get("/api/models/fake_slow/status").json()["pids"]
    assert psutil.Process(pid).environ()["FAKE_SECONDS"] == "0.25"


def test_models_to_preload_are_started(dev_server: StartServer) -> None:
    server = dev_server("--preload-models", "fake_echo, fake_broken")

    server.post("/load", {"model": "fake_echo"})

    assert server.get("/api/models/fake_echo/status").json()["state"] == "running"
    assert server.get("/api/models/fake_broken/status").json()["state"] == "failed"


def test_first_requests_at_once_load_a_model_once(dev_server: StartServer) -> None:
    server = dev_server(FAKE_LOAD_SECONDS="0.3", FAKE_SECONDS="0.01")

    answers = at_once(64, lambda _: server.post(SLOW, {"image": PNG}))

    assert [answer.status_code for answer in answers] == [200] * 64
    assert {load for answer in answers for load in re.findall(r"load (\d+)", answer.json()[0])} == {"1"}


def test_result_check_interval_adds_no_latency(dev_server: StartServer) -> None:
    server = dev_server(RESULT_CHECK_INTERVAL="60", FAKE_SECONDS="0.01", FAKE_LOAD_SECONDS="0")

    begun = time.monotonic()
    answers = [server.post(SLOW, {"image": PNG}) for _ in range(5)]
    seconds = time.monotonic() - begun

    assert all(answer.ok for answer in answers)
    assert seconds < 60


def test_requests_that_stall_do_not_block_others(dev_server: StartServer) -> None:
    server = dev_server()
    port = int(server.url.rpartition(":")[2])
    stalled = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(16)]
    for connection in stalled:
        connection.sendall(f"POST {CAPTION} HTTP/1.1\r\nHost: local".encode())

    answer = server.post(CAPTION, {"image": PNG}, timeout=20)

    for connection in stalled:
        connection.close()
    assert answer.ok


@pytest.mark.parametrize("build", ["entrypoint", "dev_server"])
def test_start_up_imports_no_heavy_library(tmp_path: Path, build: str) -> None:
    make = {
        "entrypoint": "from feature_extraction_server.flask.entrypoint import entrypoint; app = entrypoint()",
        "dev_server": (
            "from feature_extraction_server.core.settings import SettingsManager;"
            "from feature_extraction_server.core.setup import build_engine;"
            "from feature_extraction_server.flask.app import create_app;"
            "app = create_app(build_engine(SettingsManager()))"
        ),
    }[build]
    source = f"""
import json, sys
{make}
assert app.test_client().get("/api/tasks/list").status_code == 200
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""

    result = subprocess.run(
        [sys.executable, "-c", source],
        cwd=tmp_path,
        env=server_environment(tmp_path),
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    )

    heavy = {"torch", "transformers", "numpy", "scipy", "pandas", "soundfile", "soxr", "accelerate", "tokenizers"}
    assert heavy & set(json.loads(result.stdout)) == set()


def test_log_rotates_while_several_processes_write(tmp_path: Path) -> None:
    source = """
import sys
from feature_extraction_server.core import logs
from feature_extraction_server.core.settings import SettingsManager
logs.MAX_FILE_BYTES, logs.KEPT_FILES = 20_000, 50
server = logs.LogServer(SettingsManager())
server.configure()
for index in range(400):
    logs.logging.getLogger(logs.LOGGER_NAME).info("writer %s line %d %s", sys.argv[1], index, "x" * 200)
server.close()
"""
    environment = server_environment(tmp_path)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", source, str(index)], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
        )
        for index in range(3)
    ]

    statuses = [writer.wait(60) for writer in writers]

    files = [path for path in tmp_path.glob("log.txt*") if not path.name.endswith(".lock")]
    lines = [line for path in files for line in path.read_text().splitlines()]
    found = [re.fullmatch(r"\S+ \S+ INFO \[.*: writer (\d) line (\d+) x{200}", line) for line in lines]
    assert statuses == [0, 0, 0]
    assert len(files) > 5
    assert all(found)
    assert len({match.groups() for match in found if match}) == 3 * 400


def test_answers_are_utf8_whatever_the_locale(dev_server: StartServer) -> None:
    server = dev_server(LANG="C", LC_ALL="C", PYTHONUTF8="0")

    assert server.get("/api/models/%C3%BC/status").json()["error"].startswith("there is no model 'ü'")
