"""``make test`` and ``.ci/run``: what they run, in which order, and that they fail where a part fails."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dev_server import ROOT
from tests.packaging.conftest import Environment

TOOLS = ("ruff", "hadolint", "shellcheck", "jactionlint", "mypy", "python")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The commands in a directory of their own, whose tools only print their name (python is what runs pytest)."""
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("dev_requirements.txt", "dev_weights.txt", "dev_pyannote.txt"):
        (tmp_path / name).touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for tool in TOOLS:
        write_tool(tmp_path, tool, 0)
    (tmp_path / ".venv" / ".installed").touch()
    for program in ("chromium", "tesseract"):
        write_script(tmp_path / "system" / program, "")
    return tmp_path


def write_tool(checkout: Path, name: str, status: int) -> None:
    write_script(checkout / ".venv" / "bin" / name, f'echo "this is {name} $*"\nexit {status}')


def write_script(file: Path, lines: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/bin/sh\n{lines}\n")
    file.chmod(0o755)


def run(checkout: Path, *command: str) -> subprocess.CompletedProcess[str]:
    # What an outer make passes on to the makes below it is not for this one.
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    environment["PATH"] = f"{checkout / 'system'}{os.pathsep}{environment['PATH']}"
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("command", [("make", "test"), (".ci/run",)], ids=["make test", ".ci/run"])
def test_command_runs_every_tool_and_ends_with_the_tests(checkout: Path, command: tuple[str, ...]) -> None:
    done = run(checkout, *command)

    lines = [line for line in done.stdout.splitlines() if line.startswith("this is ")]
    assert done.returncode == 0, done.stderr
    assert list(dict.fromkeys(line.split()[2] for line in lines)) == list(TOOLS)
    assert done.stdout.splitlines()[-1].startswith("this is python -m pytest")


@pytest.mark.parametrize("tool", TOOLS)
def test_ci_fails_where_one_tool_fails(checkout: Path, tool: str) -> None:
    write_tool(checkout, tool, 1)

    done = run(checkout, ".ci/run")

    assert done.returncode != 0
    assert done.stdout.splitlines()[-1].startswith(f"this is {tool}")


def test_setup_installs_again_where_the_requirements_are_newer(checkout: Path) -> None:
    write_tool(checkout, "pip", 0)
    stamp = checkout / ".venv" / ".installed"
    os.utime(stamp, (0, 0))

    first, second = run(checkout, "make", "setup"), run(checkout, "make", "setup")

    assert "pip install" in first.stdout
    assert "pip install" not in second.stdout


def test_setup_refuses_an_old_python(checkout: Path) -> None:
    (checkout / ".venv" / ".installed").unlink()
    write_tool(checkout, "old_python", 1)

    done = run(checkout, "make", "setup", "PYTHON=.venv/bin/old_python")

    assert done.returncode != 0
    assert not (checkout / ".venv" / ".installed").exists()


@pytest.mark.packaging
def test_packages_are_installed_by_uv_from_where_pip_is_told_to_and_by_pip_where_uv_cannot(
    environment: Environment,
) -> None:
    script = str(ROOT / ".ci" / "install.py")

    write_script(environment.bin / "uv", 'echo "$*, from $UV_INDEX and $UV_FIND_LINKS, with $UV_CONSTRAINT"')
    by_uv = environment.run(
        *("python", script, "--no-deps", "some"),
        PIP_INDEX_URL="file:///main",
        PIP_EXTRA_INDEX_URL="file:///a file:///b",
        PIP_FIND_LINKS="/c /d",
        PIP_CONSTRAINT="/e",
    )
    write_script(environment.bin / "uv", "exit 1")
    by_pip = environment.run("python", script, "pip")  # which is there

    assert by_uv == (
        f"pip install --quiet --python {environment.python} --no-deps some, "
        "from file:///main file:///a file:///b and /c,/d, with /e"
    )
    assert by_pip == "uv could not install it: pip is asked to"


def find(program: str, checkout: Path, user: int, **programs: str) -> subprocess.CompletedProcess[str]:
    """Run ``.ci/chromium`` or ``.ci/tesseract`` where there are no programs but these."""
    folder = checkout / "bare"
    for name, lines in ({"id": f"echo {user}"} | programs).items():
        write_script(folder / name, lines)
    command = ["/bin/sh", f".ci/{program}"]
    return subprocess.run(command, cwd=checkout, env={"PATH": str(folder)}, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("program", ["chromium", "tesseract"])
@pytest.mark.parametrize(
    ("programs", "said", "asked"),
    [
        pytest.param({"PROGRAM": ""}, "", None, id="it is there"),
        pytest.param({}, "will be skipped", None, id="there is no apt-get"),
        pytest.param({"apt_get": ""}, "installing", "install --yes", id="it can be installed"),
        pytest.param({"apt_get": "exit 100"}, "could not be installed", "update --quiet", id="it cannot be installed"),
    ],
)
def test_program_is_installed_where_it_is_missing_and_that_is_possible(
    checkout: Path, program: str, programs: dict[str, str], said: str, asked: str | None
) -> None:
    record = checkout / "asked"
    names = {"PROGRAM": program, "apt_get": "apt-get"}
    found = {names[name]: f'echo "$*" >>{record}\n{lines}' for name, lines in programs.items()}

    done = find(program, checkout, 0, **found)

    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert bool(done.stdout) == bool(said)
    assert (asked in record.read_text()) if asked else not record.exists()


@pytest.mark.parametrize("program", ["chromium", "tesseract"])
def test_program_is_not_installed_by_who_may_not(checkout: Path, program: str) -> None:
    done = find(program, checkout, 1000, **{"apt-get": "exit 1"})

    assert done.returncode == 0
    assert "will be skipped" in done.stdout


def test_tesseract_is_installed_by_who_may_become_root(checkout: Path) -> None:
    record = checkout / "asked"
    programs = {"apt-get": "", "true": "", "sudo": f'echo "$*" >>{record}'}

    done = find("tesseract", checkout, 1000, **programs)

    assert done.returncode == 0
    assert "apt-get install" in record.read_text()
