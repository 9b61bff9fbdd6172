"""The Docker image, but for Docker: its scripts and its command, run in a virtual environment in its place."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest
import trustme

from dev_server import ROOT
from tests.conftest import Server, free_port
from tests.packaging.conftest import CORE, PLUGINS, Environment, plugin_name

INSTALL_PLUGINS = ROOT / "docker" / "install_plugins.sh"
INSTALL_SYSTEM_DEPENDENCIES = ROOT / "docker" / "install_system_dependencies.sh"
HEALTH_CHECK = ROOT / "docker" / "healthcheck.py"
DOCKERFILE = ROOT / "Dockerfile"
# Each instruction is one line of this.
INSTRUCTIONS = DOCKERFILE.read_text().replace("\\\n", "")

MODEL = """
def load_model():
    pass

def image_captioning(image, config):
    return [[f"{picture.width} wide"] for picture in image]
"""
MODEL_PYPROJECT = """
[build-system]
requires = ["flit_core >=4,<5"]
build-backend = "flit_core.buildapi"

[project]
name = "feature_extraction_server-models-tiny"
version = "1.0.0"
description = "A model without weights."
dependencies = ["feature_extraction_server-core"]

[tool.flit.module]
name = "feature_extraction_server.models.tiny"
"""


def write_model_plugin(folder: Path, system_dependencies: str = "") -> Path:
    """Write the plugin ``models.tiny`` below ``folder`` and return its own folder."""
    plugin = folder / "feature_extraction_server-models-tiny"
    module = plugin / "feature_extraction_server" / "models" / "tiny.py"
    module.parent.mkdir(parents=True)
    module.write_text(MODEL)
    (plugin / "pyproject.toml").write_text(MODEL_PYPROJECT)
    if system_dependencies:
        (plugin / "install_system_dependencies.sh").write_text(f"set -eu\n{system_dependencies}\n")
    return plugin


def image_command() -> str:
    """Return the Dockerfile's CMD as a shell command, on the paths of the checkout."""
    (command,) = re.findall(r"^CMD (\[.+\])$", DOCKERFILE.read_text(), re.MULTILINE)
    return shlex.join(json.loads(command)).replace("/app/", f"{ROOT}/") + " -b :5000"


@pytest.fixture
def plugins_to_install(tmp_path: Path) -> Path:
    """A directory as the repository has it: with a README alone."""
    return Path(shutil.copytree(ROOT / "plugins_to_install", tmp_path / "plugins_to_install"))


@pytest.fixture
def fake_python(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """The log of a ``python`` that only notes its arguments, and the variables that put it first on the path."""
    log, folder = tmp_path / "python.log", tmp_path / "fake_bin"
    folder.mkdir()
    log.touch()
    (folder / "python").write_text(f'#!/bin/sh\necho "$@" >> "{log}"\n')
    (folder / "python").chmod(0o755)
    return log, {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def install(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(INSTALL_PLUGINS), str(folder)], env=environment, capture_output=True, text=True, timeout=240
    )


def check_health(url: str) -> subprocess.CompletedProcess[str]:
    # A proxy that cannot be reached: the check must not use it.
    environment = {"http_proxy": "http://127.0.0.1:1"}
    return subprocess.run(
        [sys.executable, str(HEALTH_CHECK), url], env=environment, capture_output=True, text=True, timeout=60
    )


def test_dockerfile_passes_hadolint() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("hadolint")), str(DOCKERFILE)], capture_output=True, text=True, timeout=60
    )

    assert done.stdout + done.stderr == ""
    assert done.returncode == 0


def test_build_context_has_everything_that_the_dockerfile_copies() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}

    lines = re.findall(r"^COPY (?:--chmod=\d+ )?(?!--)(.+)$", INSTRUCTIONS, re.MULTILINE)
    copied = {source for line in lines for source in line.split()[:-1]}
    sources = copied | set(re.findall(r"--mount=type=bind,source=([^,\s]+)", INSTRUCTIONS))

    assert {source for source in sources if not (ROOT / source).exists()} == set()
    assert {Path(source).parts[0] for source in sources} == kept


@pytest.mark.parametrize("script", [INSTALL_PLUGINS, INSTALL_SYSTEM_DEPENDENCIES], ids=lambda script: script.stem)
def test_image_runs_scripts_that_are_executable(script: Path) -> None:
    assert os.access(script, os.X_OK)


def test_image_says_which_version_of_the_server_it_has() -> None:
    (version,) = re.findall(r'org.opencontainers.image.version="([^"]+)"', INSTRUCTIONS)

    assert version == tomllib.loads((CORE / "pyproject.toml").read_text())["project"]["version"]


def test_image_runs_as_a_user_that_kubernetes_can_tell_from_root() -> None:
    last_stage = INSTRUCTIONS.split("\nFROM ")[-1]

    assert re.findall(r"^USER (\S+)$", last_stage, re.MULTILINE) == ["1000:1000"]


def test_last_stage_has_the_interpreter_that_the_virtual_environment_was_made_with() -> None:
    build, last = re.findall(r"^FROM (\S+)", INSTRUCTIONS, re.MULTILINE)

    assert last == f"{build}-slim"


def test_nothing_is_installed_from_an_empty_directory(
    plugins_to_install: Path, fake_python: tuple[Path, dict[str, str]]
) -> None:
    log, environment = fake_python

    done = install(plugins_to_install, environment)

    assert done.returncode == 0
    assert "no plugin" in done.stderr
    assert log.read_text() == ""


def test_directory_that_is_no_plugin_is_refused_by_name(
    plugins_to_install: Path, fake_python: tuple[Path, dict[str, str]]
) -> None:
    log, environment = fake_python
    (plugins_to_install / "plugins").mkdir()

    done = install(plugins_to_install, environment)

    assert done.returncode == 1
    assert "plugins_to_install/plugins/ is not a plugin" in done.stderr
    assert log.read_text() == ""


def test_system_dependencies_that_fail_stop_the_installation(
    plugins_to_install: Path, fake_python: tuple[Path, dict[str, str]]
) -> None:
    log, environment = fake_python
    write_model_plugin(plugins_to_install, system_dependencies="exit 3")

    done = install(plugins_to_install, environment)

    assert done.returncode == 3
    assert log.read_text() == ""


def test_system_dependencies_are_installed_in_the_plugins_folder_before_the_plugin(
    plugins_to_install: Path, fake_python: tuple[Path, dict[str, str]]
) -> None:
    log, environment = fake_python
    plugin = write_model_plugin(plugins_to_install, system_dependencies=f'echo "system: $PWD" >> "{log}"')

    done = install(plugins_to_install, environment)

    first, second = log.read_text().splitlines()
    assert done.returncode == 0, done.stderr
    assert first == f"system: {plugin}"
    assert second.startswith("-m pip install")
    assert second.endswith(f"{plugin}/")


def test_system_dependencies_are_installed_without_the_plugin_where_that_is_all_that_is_wanted(
    plugins_to_install: Path, fake_python: tuple[Path, dict[str, str]]
) -> None:
    log, environment = fake_python
    write_model_plugin(plugins_to_install, system_dependencies=f'echo "system" >> "{log}"')

    done = subprocess.run([str(INSTALL_SYSTEM_DEPENDENCIES), str(plugins_to_install)], env=environment, timeout=60)

    assert done.returncode == 0
    assert log.read_text() == "system\n"


@pytest.mark.parametrize(
    ("arguments", "index"),
    [
        pytest.param({}, "", id="nothing said"),
        pytest.param({"DEVICE": "cpu", "TORCH_INDEX_URL": ""}, "", id="cpu"),
        pytest.param({"DEVICE": "cuda", "TORCH_INDEX_URL": ""}, "", id="cuda"),
        pytest.param(
            {"DEVICE": "cpu", "TORCH_INDEX_URL": "file:///i"}, "--extra-index-url file:///i ", id="index, cpu"
        ),
        pytest.param(
            {"DEVICE": "cuda", "TORCH_INDEX_URL": "file:///i"}, "--extra-index-url file:///i ", id="index, cuda"
        ),
    ],
)
def test_torch_comes_from_the_index_that_is_given(
    plugins_to_install: Path, fake_python: tuple[Path, dict[str, str]], arguments: dict[str, str], index: str
) -> None:
    log, environment = fake_python
    plugin = write_model_plugin(plugins_to_install)

    install(plugins_to_install, environment | arguments)

    assert log.read_text() == f"-m pip install {index}{plugin}/\n"


@pytest.mark.parametrize(
    ("device", "extra"), [pytest.param("cpu", "", id="cpu"), pytest.param("cuda", "[cuda]", id="cuda")]
)
def test_what_a_plugin_needs_on_a_gpu_alone_is_installed_for_cuda(
    plugins_to_install: Path, fake_python: tuple[Path, dict[str, str]], device: str, extra: str
) -> None:
    log, environment = fake_python
    (whisper,) = (plugin for plugin in PLUGINS if plugin_name(plugin) == "models.faster_whisper")
    shutil.copytree(whisper, plugins_to_install / whisper.name)

    install(plugins_to_install, environment | {"DEVICE": device})

    assert log.read_text() == f"-m pip install {plugins_to_install / whisper.name}/{extra}\n"


def test_device_that_is_neither_cpu_nor_cuda_is_refused_by_name(
    plugins_to_install: Path, fake_python: tuple[Path, dict[str, str]]
) -> None:
    log, environment = fake_python
    write_model_plugin(plugins_to_install)

    done = install(plugins_to_install, environment | {"DEVICE": "gpu"})

    assert done.returncode == 1
    assert "DEVICE=gpu is not allowed: it must be cpu or cuda" in done.stderr
    assert log.read_text() == ""


@pytest.mark.packaging
@pytest.mark.process
def test_image_serves_the_plugins_that_were_to_be_installed_and_ends_on_sigterm(
    environment: Environment,
    serve: Callable[..., Server],
    plugins_to_install: Path,
    tmp_path: Path,
    picture: str,
) -> None:
    chosen = {"apis.base_api", "tasks.image_captioning"}
    for plugin in PLUGINS:
        if plugin_name(plugin) in chosen:
            shutil.copytree(plugin, plugins_to_install / plugin.name)
    write_model_plugin(plugins_to_install)
    environment.install(CORE)
    environment.run(str(INSTALL_PLUGINS), str(plugins_to_install))

    server = serve(environment, image_command(), tmp_path, NUMBER_OF_WORKERS="2")

    answer = server.post("/api/tasks/image_captioning/features", {"image": picture})
    processes = psutil.Process(server.process.pid).children(recursive=True)
    assert server.get("/api/tasks/list").json() == ["image_captioning"]
    assert answer.json() == ["40 wide"]
    assert check_health(f"{server.url}/health/live").returncode == 0
    assert len(processes) >= 2
    assert server.stop() == 0
    assert psutil.wait_procs(processes, timeout=30)[1] == []


@contextmanager
def answering(status: int | None, context: ssl.SSLContext | None = None) -> Iterator[int]:
    """Answer all requests with a status, over TLS where there is a context; None closes connections. Yield the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if status is not None:
                self.send_response(status)
                self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def tls() -> ssl.SSLContext:
    """A server's part of TLS, with a certificate that nobody knows, of another name than the address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("server.example").configure_cert(context)
    return context


HEALTH = pytest.mark.parametrize(
    ("answer", "exit_status"),
    [
        pytest.param(200, 0, id="200"),
        pytest.param(404, 0, id="404, as without the plugin that has the route"),
        pytest.param(500, 1, id="500"),
        pytest.param(503, 1, id="503"),
    ],
)


@HEALTH
def test_health_check_passes_on_any_answer_but_a_server_error(answer: int, exit_status: int) -> None:
    with answering(answer) as port:
        done = check_health(f"http://127.0.0.1:{port}/health/live")

    assert done.returncode == exit_status
    assert (f"answered {answer}" in done.stderr) == (exit_status == 1)


@HEALTH
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_health_check_gets_its_answer_over_tls_where_the_server_speaks_that(
    tls: ssl.SSLContext, scheme: str, answer: int, exit_status: int
) -> None:
    with answering(answer, tls) as port:
        done = check_health(f"{scheme}://127.0.0.1:{port}/health/live")

    assert done.returncode == exit_status
    assert (f"https://127.0.0.1:{port}/health/live answered {answer}" in done.stderr) == (exit_status == 1)


def test_health_check_fails_where_connections_are_closed_without_an_answer() -> None:
    with answering(None) as port:
        done = check_health(f"http://127.0.0.1:{port}/health/live")

    assert done.returncode == 1
    assert re.findall(r"(https?)://\S+ does not answer", done.stderr) == ["http", "https"]


def test_health_check_fails_where_nothing_listens() -> None:
    done = check_health(f"http://127.0.0.1:{free_port()}/health/live")

    assert done.returncode == 1
    assert re.findall(r"(https?)://\S+ does not answer", done.stderr) == ["http"]
