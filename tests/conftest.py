"""Fixtures: engines and apps in this process, servers in processes of their own, and plugins made for one test."""

from __future__ import annotations

import base64
import gc
import importlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from flask.testing import FlaskClient
from PIL import Image

from dev_server import ROOT, SOURCES

FAKES = ROOT / "tests" / "fakes"
CLIENT = ROOT / "feature_extraction_server-client"
PLUGIN_PATH = [str(folder) for folder in (*SOURCES, FAKES)]
sys.path[:0] = [folder for folder in (*PLUGIN_PATH, str(CLIENT)) if folder not in sys.path]

from feature_extraction_server.core.engine import Engine  # noqa: E402 - the path is set above
from feature_extraction_server.core.settings import SettingsManager  # noqa: E402
from feature_extraction_server.core.setup import build_engine  # noqa: E402
from feature_extraction_server.flask.app import create_app  # noqa: E402

START_TIMEOUT_S = 120
#: Folders of tests, those with the longest files first: what begins last should end soon.
LONGEST_FIRST = ("process", "ray", "browser", "packaging", "docs", "plugins", "http", "client", "core")

# A shell's job in the background ignores it, as would every process that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the tests into the order in which several processes end at about the same time (``.ci/test``)."""
    items.sort(key=lambda item: [folder in item.path.parts for folder in LONGEST_FIRST], reverse=True)


@pytest.fixture(scope="session")
def lasting_process() -> psutil.Process | None:
    """A process that is to outlive a test, together with its children; a folder's own ``conftest`` may have one."""
    return None


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection() -> None:
    """Let collections pass over what is there already, libraries and tests: a model's end waits for a whole one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_left_behind(lasting_process: psutil.Process | None) -> Iterator[None]:
    """Fail a test that leaves a consumer thread or a child process."""
    yield
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("consumer-")]
        if not threads and not _has_children():
            return
        lasting = {lasting_process, *lasting_process.children(recursive=True)} if lasting_process else set()
        found = set(psutil.Process().children(recursive=True)) - lasting
        children = [child for child in found if not is_gone(child)]
        if not threads and not children:
            return
        time.sleep(0.01)
    pytest.fail(f"left behind: threads {threads}, processes {children}")


@pytest.fixture(autouse=True)
def pillows_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give Pillow back the limit of pixels that it had: to decode a picture sets it for the whole process."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


def is_gone(process: psutil.Process) -> bool:
    """Tell whether a process has ended; its parent may not have asked yet how."""
    try:
        return not process.is_running() or bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # it has just ended
        return True


def _has_children() -> bool:
    """Ask the system, which takes no search through all processes."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str, str], None]]:
    """``plugin(kind, name, source)`` makes a plugin module that can be discovered until the test ends."""
    folder = tmp_path / "plugins"
    made: list[str] = []
    monkeypatch.syspath_prepend(str(folder))

    def make(kind: str, name: str, source: str) -> None:
        path = folder / "feature_extraction_server" / kind / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        made.append(f"feature_extraction_server.{kind}.{name}")
        importlib.invalidate_caches()

    yield make
    for name in made:
        sys.modules.pop(name, None)


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """``build(SETTING=value, ...)`` makes an engine over all plugins and the fakes; it is closed after the test."""
    engines: list[Engine] = []

    def make(**environment: str) -> Engine:
        environment = {"LOG_PATH": str(tmp_path / "log.txt"), "STOP_GRACE_PERIOD": "5"} | environment
        engines.append(build_engine(SettingsManager(environment, tmp_path / ".env")))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(build: Callable[..., Engine]) -> Engine:
    return build()


@pytest.fixture
def client(engine: Engine) -> FlaskClient:
    """A client of the app in this process, with the default settings."""
    return create_app(engine).test_client()


class Server:
    """A real server process: ``url`` is where it answers, ``log()`` what it printed."""

    def __init__(self, command: list[str], port: int, folder: Path, environment: dict[str, str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / f"server-{port}.log"
        self._file = self._log.open("wb")
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=self._file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )

    def wait_until_ready(self) -> Server:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if requests.get(f"{self.url}/api/tasks/list", timeout=5).ok:
                    return self
            except requests.RequestException:
                time.sleep(0.02)
        raise AssertionError(f"the server did not come up (exit status {self.process.poll()}):\n{self.log()}")

    def post(self, path: str, json: Any, timeout: float = 120) -> requests.Response:
        return requests.post(self.url + path, json=json, timeout=timeout)

    def get(self, path: str, timeout: float = 120) -> requests.Response:
        return requests.get(self.url + path, timeout=timeout)

    def workers(self) -> set[psutil.Process]:
        """Return the processes of a gunicorn that answer requests; the engine is none of them."""
        return self._processes("gunicorn")

    def engines(self) -> set[psutil.Process]:
        return self._processes("feature_extraction_server.core.engine_process")

    def _processes(self, program: str) -> set[psutil.Process]:
        found = set()
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):  # it has just ended
                if program in child.cmdline():
                    found.add(child)
        return found

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self) -> int:
        """End the server as an operator does, and return its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(60)  # gunicorn kills a worker that was asked to end while it began after 30
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the server did not end on SIGTERM:\n{self.log()}") from None
        finally:
            self._file.close()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def server_environment(folder: Path, **settings: str) -> dict[str, str]:
    """Return a process's environment: all plugins and the fakes on its path, its log in ``folder``."""
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    own = {"PYTHONPATH": os.pathsep.join(PLUGIN_PATH), "LOG_PATH": str(folder / "log.txt"), "HF_HUB_OFFLINE": "1"}
    return inherited | own | settings


def gunicorn_command(port: int, *arguments: str) -> list[str]:
    target = "feature_extraction_server.flask.entrypoint:entrypoint()"
    # The socket that gunicorn is controlled by is the user's: all servers would share it. Its end takes seconds.
    options = ["-b", f"127.0.0.1:{port}", "--no-control-socket", *arguments]
    return [sys.executable, "-m", "gunicorn", *options, target]


def worker_configuration(folder: Path, **constants: float) -> str:
    """Return the path of the repository's gunicorn.conf.py with other values for constants of ``flask/worker.py``."""
    path = folder / "gunicorn_with_other_constants.py"
    lines = [f"worker.{name} = {value}" for name, value in constants.items()]
    read = f"exec(open({str(ROOT / 'gunicorn.conf.py')!r}).read())"
    path.write_text("\n".join(["from feature_extraction_server.flask import worker", *lines, read, ""]))
    return str(path)


def dev_server_command(port: int, *options: str) -> list[str]:
    return [sys.executable, str(ROOT / "dev_server.py"), "--host", "127.0.0.1", "--port", str(port), *options]


@contextmanager
def starting(folder: Path, command: Callable[..., list[str]]) -> Iterator[Callable[..., Server]]:
    """Give what starts servers by ``command(port, *arguments)`` and returns each when it answers; end them all."""
    servers: list[Server] = []

    def start(*arguments: str, **settings: str) -> Server:
        port = free_port()
        servers.append(Server(command(port, *arguments), port, folder, server_environment(folder, **settings)))
        return servers[-1].wait_until_ready()

    try:
        yield start
    finally:
        for server in servers:
            server.stop()


@pytest.fixture
def gunicorn(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """``gunicorn(*arguments, SETTING=value, ...)`` starts a real gunicorn and returns it when it answers."""
    with starting(tmp_path, gunicorn_command) as start:
        yield start


@pytest.fixture
def dev_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """``dev_server(*options, SETTING=value, ...)`` starts ``dev_server.py`` and returns it when it answers."""
    with starting(tmp_path, dev_server_command) as start:
        yield start


def encode_image(image: Image.Image, format: str = "PNG", **options: Any) -> str:
    """Return a picture as the base64 of a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture
def picture() -> str:
    """A valid request image: 40 x 30 pixels of red, as base64 PNG."""
    return encode_image(Image.new("RGB", (40, 30), "red"))
