"""``fes new-plugin``: what it writes works at once, passes its own test and every check."""

from __future__ import annotations

import os
import re
import resource
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import requests
from packaging.requirements import Requirement
from PIL import Image

from dev_server import ROOT, SOURCES
from feature_extraction_server.client import Client
from feature_extraction_server.client.schema import example_of
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.plugins import BUILT_IN_CONSUMERS
from tests.client.conftest import Done
from tests.conftest import CLIENT, PLUGIN_PATH, Server
from tests.packaging.conftest import plugin_name
from tests.waiting import TIMEOUT_S

Fes = Callable[..., Done]

KINDS = {"model": ("--task", "image_captioning"), "task": (), "api": (), "consumer": ()}
TASKS = sorted(source.name.rpartition("-")[2] for source in SOURCES if "-tasks-" in source.name)


# The source of a task, as far as a test leaves it.
TASK = """
from typing import Any, Literal
from feature_extraction_server.core.task import ConfigField, TaskSpec, TextField
task = TaskSpec(
    description="It gives this and that.",
    inputs={{"{field}": TextField("The text"), "config": ConfigField()}},
    output={output},
    example={example},
)
wrap = task.wrap
"""


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


@pytest.mark.parametrize(
    ("task", "field", "output", "example"),
    [
        pytest.param("my_task", "text", "Literal['cat', 'dog']", None, id="one of several texts"),
        pytest.param("my_task", "text", "Literal['cat']", None, id="one text"),
        pytest.param("my_task", "text", "tuple[int, str]", None, id="tuple"),
        pytest.param("my_task", "text", "tuple[int, str]", (1, "a"), id="tuple with an example"),
        pytest.param("my_task", "text", "float", 1, id="number with an example that is an integer"),
        pytest.param("my_task", "text", "float | None", 1, id="number or nothing"),
        pytest.param("my_task", "text", "Any", None, id="anything"),
        pytest.param("my_task", "answer", "str", None, id="field called answer"),
        pytest.param("answer", "text", "str", None, id="task called answer"),
    ],
)
def test_new_model_of_any_task_passes_its_own_test(
    fes: Fes,
    plugin: Callable[[str, str, str], None],
    build: Callable[[], Engine],
    tmp_path: Path,
    task: str,
    field: str,
    output: str,
    example: object,
) -> None:
    plugin("tasks", task, TASK.format(field=field, output=output, example=repr(example)))
    folder = write(fes, tmp_path, "model", "my_model", "--task", task)
    plugin("models", "my_model", (folder / "feature_extraction_server" / "models" / "my_model.py").read_text())

    tests = runpy.run_path(str(folder / "tests" / "test_my_model.py"))

    engine = build()
    for name in [name for name in tests if name.startswith("test_")]:
        tests[name](engine)


def test_integers_of_an_example_are_floats_where_numbers_are_declared() -> None:
    numbers = {"type": "array", "items": {"type": "number"}, "examples": [[1, 0]]}

    example = example_of({"anyOf": [numbers, {"type": "array", "items": numbers}]})

    assert repr(example) == "[1.0, 0.0]"


def test_task_is_read_by_its_wrap(fes: Fes, plugin: Callable[[str, str, str], None], tmp_path: Path) -> None:
    source = TASK.format(field="text", output="str", example=None).replace("task = ", "spec = ")
    plugin("tasks", "my_task", source.replace("task.wrap", "spec.wrap"))

    folder = write(fes, tmp_path, "model", "my_model", "--task", "my_task")

    assert "text: list[str]" in (folder / "feature_extraction_server" / "models" / "my_model.py").read_text()


@pytest.mark.parametrize(
    ("kind", "name", "module"),
    [
        ("model", "my_model", "models.my_model"),
        ("task", "my_task", "tasks.my_task"),
        ("api", "my_api", "apis.my_api"),
        ("consumer", "my_consumer", "consumers.my_consumer"),
        ("consumer", "my", "consumers.my_consumer"),
    ],
)
def test_new_plugin_is_named_as_those_of_this_repository(
    fes: Fes, tmp_path: Path, kind: str, name: str, module: str
) -> None:
    folder = write(fes, tmp_path, kind, name, *KINDS[kind])

    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert plugin_name(folder) == module
    assert project["project"]["name"] == folder.name
    assert project["tool"]["flit"]["module"]["name"] == f"feature_extraction_server.{module}"
    assert (folder / "feature_extraction_server" / f"{module.replace('.', '/')}.py").exists()


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


def test_contributing_s_command_writes_a_model_where_nothing_is_installed(tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (command,) = re.findall(r"^```bash\n([^`]* new-plugin [^`]*)```$", text, re.MULTILINE)
    command = command.replace(".venv/bin/python", shlex.quote(sys.executable))
    command = command.replace("--directory plugins", f"--directory {shlex.quote(str(tmp_path))}")

    done = subprocess.run(["sh", "-c", command], cwd=ROOT, env={}, capture_output=True, text=True, timeout=TIMEOUT_S)

    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()).parent == tmp_path


@pytest.mark.parametrize(
    ("option", "printed"), [("--json", '{{"folder": "{}"}}'), ("--no-json", "{}")], ids=["JSON", "text"]
)
def test_new_plugin_s_path_is_printed(fes: Fes, tmp_path: Path, option: str, printed: str) -> None:
    done = fes("new-plugin", "task", "my_task", "--directory", tmp_path, option)

    assert done.out == printed.format(tmp_path / "feature_extraction_server-tasks-my_task") + "\n"


@pytest.mark.parametrize(
    "name", ["my-model", "MyModel", "1model", "class", "_model", "a/b", "", "class_", "modèle", "\ufb01sh"]
)
def test_name_that_no_module_can_have_is_refused(fes: Fes, tmp_path: Path, name: str) -> None:
    done = fes("new-plugin", "task", name, "--directory", tmp_path)

    assert (done.status, list(tmp_path.iterdir())) == (2, [])
    assert "choose one like my_task" in done.err


@pytest.mark.parametrize("name", ["my__consumer", "_consumer"])
def test_name_that_no_distribution_can_have_is_refused(fes: Fes, tmp_path: Path, name: str) -> None:
    done = fes("new-plugin", "consumer", name, "--directory", tmp_path)

    assert (done.status, list(tmp_path.iterdir())) == (2, [])
    assert "choose one like my_consumer" in done.err


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("consumer", name) for name in BUILT_IN_CONSUMERS),
        ("consumer", "process"),
        ("model", "default"),
        *(("task", name) for name in ("load_model", "unload_model", "add_settings", "config_types", "image_sizes")),
        *(("task", name) for name in ("consumer_type", "samples", "checkpoint", "provenance")),
    ],
)
def test_name_that_the_server_uses_is_refused(fes: Fes, tmp_path: Path, kind: str, name: str) -> None:
    done = fes("new-plugin", kind, name, "--directory", tmp_path, *KINDS[kind])

    assert (done.status, list(tmp_path.iterdir())) == (2, [])
    assert "the server uses this name for something else" in done.err


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("1 / 0", "the task my_task cannot be read: ZeroDivisionError: division by zero"),
        ("import not_there", "the task my_task cannot be read: ModuleNotFoundError: No module named 'not_there'"),
        ("def wrap(func): return func", "the task my_task declares no batch fields"),
        (TASK.format(field="from", output="str", example=None), "a field 'from': no Python parameter"),
        (TASK.format(field="two words", output="str", example=None), "a field 'two words': no Python parameter"),
    ],
    ids=["fault", "library that is missing", "hand-written task", "keyword as a field", "words as a field"],
)
def test_task_whose_models_cannot_be_written_is_told(
    fes: Fes, plugin: Callable[[str, str, str], None], tmp_path: Path, source: str, told: str
) -> None:
    plugin("tasks", "my_task", source)

    done = fes("new-plugin", "model", "my_model", "--task", "my_task", "--directory", tmp_path / "new")

    assert (done.status, (tmp_path / "new").exists()) == (2, False)
    assert told in done.err


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


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """``largest_file(n_bytes)`` lets what is beyond fail to be written, as on a full disk, until the test ends."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_plugin_that_cannot_be_written_to_the_end_leaves_nothing(
    fes: Fes, largest_file: Callable[[int], None], tmp_path: Path
) -> None:
    largest_file(100)

    done = fes("new-plugin", "task", "my_task", "--directory", tmp_path)

    assert (done.status, list(tmp_path.iterdir())) == (1, [])
    assert done.err == f"fes: {tmp_path / 'feature_extraction_server-tasks-my_task'}: File too large\n"
