"""The client is small: what it declares, and what it imports."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest

from tests.conftest import CLIENT
from tests.packaging.conftest import Environment

HEAVY = {"flask", "numpy", "PIL", "pydantic", "requests", "torch", "tqdm", "transformers", "werkzeug"}


def test_client_depends_on_little_and_not_on_the_core() -> None:
    project = tomllib.loads((CLIENT / "pyproject.toml").read_text())["project"]

    names = {re.split(r"[ <>=]", dependency)[0] for dependency in project["dependencies"]}

    assert names == {"tqdm", "urllib3"}
    assert project["optional-dependencies"].keys() == {"draw"}


@pytest.mark.parametrize(
    ("module", "allowed"),
    [("feature_extraction_server.client", set()), ("feature_extraction_server.client.cli", {"tqdm"})],
    ids=["library", "command"],
)
def test_importing_the_client_loads_no_heavy_library(module: str, allowed: set[str]) -> None:
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"

    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(CLIENT)}, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) & HEAVY <= allowed


@pytest.mark.packaging
def test_installed_client_brings_its_command_and_its_templates(environment: Environment) -> None:
    environment.install(CLIENT)

    folder = environment.run("fes", "new-plugin", "task", "my_task")

    assert (environment.folder / folder / "tests" / "test_my_task.py").exists()
