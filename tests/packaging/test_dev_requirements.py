"""``dev_requirements.txt`` has what the core, the client and all plugins depend on."""

from __future__ import annotations

import tomllib

from dev_server import ROOT
from tests.packaging.conftest import DISTRIBUTIONS


def derived_section() -> list[str]:
    lines = (ROOT / "dev_requirements.txt").read_text().splitlines()
    return lines[lines.index("# begin derived") + 1 : lines.index("# end derived")]


def declared_dependencies() -> list[str]:
    projects = [tomllib.loads((source / "pyproject.toml").read_text())["project"] for source in DISTRIBUTIONS]
    declared = {dependency for project in projects for dependency in project["dependencies"]}
    return sorted(line for line in declared if not line.startswith("feature_extraction_server-"))


def test_derived_section_is_what_the_distributions_declare() -> None:
    expected = declared_dependencies()

    assert derived_section() == expected, "the section should be:\n" + "\n".join(expected)
