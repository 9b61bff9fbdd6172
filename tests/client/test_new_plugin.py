"""``fes new-plugin``: what it writes works at once, passes its own test and every check."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import requests
from packaging.requirements import Requirement
from PIL import Image

from dev_server import ROOT, SOURCES
from feature_extraction_server.client import Client
from tests.client.conftest import Done
from tests.conftest import CLIENT, PLUGIN_PATH, Server
from tests.waiting import TIMEOUT_S

Fes = Callable[..., Done]

KINDS = {"model": ("--task", "image_captioning"), "task": (), "api": (), "consumer": ()}
TASKS = sorted(source.name.rpartition("-")[2] for source in SOURCES if "-tasks-" in source.name)


def write(fes: Fes, folder: Path, *arguments: str) -> Path:
    """Let the command write a plugin, and return its folder."""
    done = fes("new-plugin", *arguments, "--directory", folder)
    assert (done.status, done.err) == (0, "")
    return Path(done.out.strip())


def run(folder: Path, *command: str, path: Sequence[Path] = ()) -> None:
    """Run a Python module in a folder; fail where it fails."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # who writes a plugin has not those that are here
    environment["PYTHONPATH"] = environment["MYPYPATH"] = os.pathsep.join([*PLUGIN_PATH, *map(str, path)])
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_new_plugin_passes_its_own_test(fes: Fes, tmp_path: Path) -> None:
    folder = write(fes, tmp_path, "model", "my_model", *KINDS["model"])

    run(folder, "pytest", "-q", "-p", "no:cacheprovider")


def test_new_plugins_of_all_kinds_and_models_of_all_tasks_pass_their_tests(fes: Fes, tmp_path: Path) -> None:
    folders = [write(fes, tmp_path, kind, f"my_{kind}", *options) for kind, options in KINDS.items()]
    folders += [write(fes, tmp_path, "model", f"my_{task}_model", "--task", task) for task in TASKS]
    tests = [str(folder / "tests") for folder in folders]

    run(tmp_path, "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", *tests, path=folders)


@pytest.mark.parametrize("kind", KINDS)
def test_new_plugin_depends_on_a_core_like_this_one(fes: Fes, tmp_path: Path, kind: str) -> None:
    folder = write(fes, tmp_path, kind, f"my_{kind}", *KINDS[kind])
    core = tomllib.loads((SOURCES[0] / "pyproject.toml").read_text())["project"]

    (wanted,) = map(Requirement, tomllib.loads((folder / "pyproject.toml").read_text())["project"]["dependencies"])

    assert wanted.name == core["name"]
    assert core["version"] in wanted.specifier


def test_new_plugins_are_clean_by_ruff_and_mypy(fes: Fes, tmp_path: Path) -> None:
    folders = [write(fes, tmp_path, kind, f"my_{kind}", *options) for kind, options in KINDS.items()]
    folders += [write(fes, tmp_path, "model", f"my_{task}_model", "--task", task) for task in TASKS]
    files = [str(file) for folder in folders for file in folder.rglob("*.py")]

    for config in (["--isolated"], ["--config", str(ROOT / "pyproject.toml")], []):
        own_order = ["--config", 'lint.isort.known-first-party = ["feature_extraction_server"]']
        run(tmp_path, "ruff", "check", "--no-cache", *config, *(own_order if config == ["--isolated"] else []), ".")
        run(tmp_path, "ruff", "format", "--no-cache", *config, "--check", ".")
    # From the checkout, where mypy has its cache.
    run(ROOT, "mypy", *files, path=folders)


@pytest.mark.process
def test_server_runs_new_plugins_and_tells_the_schema_of_a_new_task(
    fes: Fes, gunicorn: Callable[..., Server], tmp_path: Path
) -> None:
    folders = [write(fes, tmp_path, kind, f"my_{kind}", *options) for kind, options in KINDS.items()]
    path = os.pathsep.join([*PLUGIN_PATH, *map(str, folders)])
    picture = Image.new("RGB", (4, 4))

    server = gunicorn(PYTHONPATH=path, FAKE_ECHO_CONSUMER_TYPE="my_consumer")

    with Client(server.url) as client:
        assert client.caption(picture, model="my_model") == ["a cat that is sitting on a table"]
        assert client.caption(picture, model="fake_echo") == ["4x4 (0, 0, 0)"]
        assert client.status("fake_echo")["consumer_type"] == "my_consumer"
    assert "my_model" in requests.get(f"{server.url}/my_api/models", timeout=TIMEOUT_S).json()
    model = write(fes, tmp_path, "model", "my_other", "--task", "my_task", "--url", server.url)
    run(model, "pytest", "-q", "-p", "no:cacheprovider", path=folders)


def test_new_plugin_needs_no_more_than_the_client(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "feature_extraction_server.client", "new-plugin", "task", "my_task"]

    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(CLIENT)}, capture_output=True, timeout=TIMEOUT_S
    )

    assert done.returncode == 0
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.*") if file.is_file()) == [
        f"feature_extraction_server-tasks-my_task/{file}"
        for file in (
            "README.md",
            "feature_extraction_server/tasks/my_task.py",
            "pyproject.toml",
            "tests/test_my_task.py",
        )
    ]


@pytest.mark.parametrize("name", ["my-model", "MyModel", "1model", "class", "_model", "a/b", ""])
def test_name_that_no_module_can_have_is_refused(fes: Fes, tmp_path: Path, name: str) -> None:
    done = fes("new-plugin", "task", name, "--directory", tmp_path)

    assert (done.status, list(tmp_path.iterdir())) == (2, [])
    assert "choose one like my_task" in done.err


@pytest.mark.usefixtures("url")
@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["model", "my_model"], 2, "name the task that the model implements by --task"),
        (["api", "my_api", "--task", "image_captioning"], 2, "--task is for models alone"),
        (["model", "my_model", "--task", "nothing"], 1, "there is no task 'nothing'"),
        (["model", "my_model", "--task", "fake_shout"], 2, "the task fake_shout declares no batch fields"),
        (
            ["model", "my_model", "--task", "nothing", "--url", "http://[::1]:1"],
            2,
            "is not installed here, and no server",
        ),
    ],
    ids=["no task", "task of an API", "unknown task", "hand-written task", "no server"],
)
def test_plugin_that_cannot_be_written_is_told(
    fes: Fes, tmp_path: Path, arguments: list[str], status: int, told: str
) -> None:
    done = fes("new-plugin", *arguments, "--directory", tmp_path / "new")

    assert told in done.err
    assert (done.status, (tmp_path / "new").exists()) == (status, False)


def test_folder_that_is_there_is_left_alone(fes: Fes, tmp_path: Path) -> None:
    folder = write(fes, tmp_path, "task", "my_task")
    (folder / "README.md").write_text("mine")

    done = fes("new-plugin", "task", "my_task", "--directory", tmp_path)

    assert done.status == 2
    assert "exists already" in done.err
    assert (folder / "README.md").read_text() == "mine"
