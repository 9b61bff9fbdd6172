"""Every distribution holds its own part of the namespace, and nothing else."""

from __future__ import annotations

import tomllib
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from tests.packaging.conftest import CORE, DISTRIBUTIONS, PLUGINS, plugin_name

pytestmark = pytest.mark.packaging

every_distribution = pytest.mark.parametrize(
    "source", [pytest.param(source, id=source.name) for source in DISTRIBUTIONS]
)
every_plugin = pytest.mark.parametrize("source", [pytest.param(source, id=source.name) for source in PLUGINS])


def pyproject(source: Path) -> dict[str, Any]:
    return tomllib.loads((source / "pyproject.toml").read_text())


def modules_in(wheel: Path) -> set[str]:
    with ZipFile(wheel) as file:
        return {name for name in file.namelist() if ".dist-info/" not in name}


def metadata_of(wheel: Path) -> Message:
    with ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(file.read(name).decode())


@every_distribution
def test_distribution_is_built_by_flit(source: Path) -> None:
    assert pyproject(source)["build-system"] == {
        "requires": ["flit_core >=4,<5"],
        "build-backend": "flit_core.buildapi",
    }


@every_distribution
def test_wheel_holds_what_its_folder_has_of_the_namespace(source: Path, wheels: dict[str, Path]) -> None:
    files = (file for file in (source / "feature_extraction_server").rglob("*") if file.is_file())
    expected = {str(file.relative_to(source)) for file in files if "__pycache__" not in file.parts}

    assert modules_in(wheels[source.name]) == expected


@every_distribution
def test_wheel_leaves_the_namespace_open_to_others(source: Path, wheels: dict[str, Path]) -> None:
    shared = {"", "apis/", "consumers/", "models/", "tasks/"}

    closing = {f"feature_extraction_server/{folder}__init__.py" for folder in shared}

    assert not modules_in(wheels[source.name]) & closing


@every_distribution
def test_wheel_tells_licence_python_and_description(source: Path, wheels: dict[str, Path]) -> None:
    metadata = metadata_of(wheels[source.name])

    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Summary"].endswith(".")
    assert str(metadata.get_payload()).strip() == (source / "README.md").read_text().strip()


@every_plugin
def test_folder_distribution_and_module_have_one_name(source: Path) -> None:
    declared = pyproject(source)

    assert declared["project"]["name"] == source.name
    assert declared["tool"]["flit"]["module"]["name"] == f"feature_extraction_server.{plugin_name(source)}"


@every_plugin
def test_plugin_depends_on_a_core_that_this_core_is(source: Path) -> None:
    version = pyproject(CORE)["project"]["version"]

    assert version.startswith("1.")
    assert "feature_extraction_server-core >=1.0,<2" in pyproject(source)["project"]["dependencies"]
