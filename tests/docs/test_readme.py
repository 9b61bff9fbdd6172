"""The README tells what there is: every setting, route, plugin and error, and none besides."""

from __future__ import annotations

import inspect
import re

import pytest

from dev_server import ROOT
from feature_extraction_server.core import errors
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.setup import set_up
from feature_extraction_server.flask.app import create_app

README = (ROOT / "README.md").read_text()
PLUGINS = sorted(folder.name.split("-", 2)[1:] for folder in (ROOT / "plugins").iterdir())


def rows(first_cell: str) -> dict[str, list[str]]:
    """Return the rows of the table whose heading begins with a cell, by their first cells."""
    table = README.split(f"|{first_cell}|", 1)[1].split("\n\n", 1)[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {cells[0].strip("`"): cells[1:] for cells in lines}


def heading(cell: str) -> str:
    match = re.search(rf"^\|( ?{cell} ?)\|", README, re.MULTILINE)
    assert match
    return match[1]


def generic(name: str, tasks: list[str], models: list[str]) -> str:
    """Return a setting's name as the README spells it: with {task} and {MODEL} for names of plugins."""
    for task in tasks:
        name = name.replace(f"DEFAULT_MODEL_{task.upper()}", "DEFAULT_MODEL_{TASK}")
    for model in sorted(models, key=len, reverse=True):
        name = re.sub(rf"^{model.upper()}_", "{MODEL}_", name)
        name = name.replace(f"MODEL_REPLICAS_{model.upper()}", "MODEL_REPLICAS_{MODEL}")
        name = re.sub(rf"^(RAY_[A-Z_]+)_{model.upper()}$", r"\1", name)
    return name


def wants_installation(model: str) -> bool:
    """Tell whether a model's library does not come with its plugin."""
    text = (ROOT / "plugins" / f"feature_extraction_server-models-{model}" / "README.md").read_text()
    return "\n## Install the library\n" in text


def test_table_of_settings_has_every_setting_and_its_default(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    manager = SettingsManager({"LOG_PATH": f"{tmp_path}/log.txt"})
    registry, _, log_server = set_up(manager)
    log_server.close()
    table = rows(heading("Setting"))
    declared = {
        generic(setting.name, sorted(registry.tasks), sorted(registry.models)): setting
        for setting in reversed(manager.all())  # what holds for all models comes after what holds for one
        if not setting.name.startswith("FAKE_")
    }

    assert set(table) == set(declared) | {"HOST", "PORT", "NUMBER_OF_WORKERS"}
    for name, setting in declared.items():
        default = table[name][1].strip("`")
        if setting.default is not None and not name.startswith("{MODEL}_"):
            shown = f"{setting.default:g}" if isinstance(setting.default, float) else str(setting.default)
            assert default == (shown or "-"), name


def test_every_route_is_told_and_there_is_every_route_that_is_told(engine: Engine) -> None:
    routes = {re.sub(r"<(\w+:)?(\w+)>", r"<\2>", rule.rule) for rule in create_app(engine).url_map.iter_rules()}
    api = README.split("## API plugins", 1)[1].split("### Errors", 1)[0]
    told = set(re.findall(r"`(/[\w/<>.]*)`", api)) - {"/legacy"}

    assert told == {route for route in routes if not route.startswith("/legacy/")}
    assert {route.removeprefix("/legacy") for route in routes if route.startswith("/legacy/")} <= told


def test_every_error_is_told_with_its_status() -> None:
    table = README.split("### Errors", 1)[1].split("\n## ", 1)[0]
    told = {
        (int(status), code)
        for status, codes in re.findall(r"^\| (\d{3}) \| ([^|]+) \|", table, re.MULTILINE)
        for code in re.findall(r"`(\w+)`", codes)
    }
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.ServerError)]
    unseen = {(499, "client_disconnected")}  # nobody is there to see it

    assert {(kind.status, kind.code) for kind in kinds} - unseen == told - {(405, "method_not_allowed")}


@pytest.mark.parametrize("name", [name for kind, name in PLUGINS if kind == "models"])
def test_every_model_is_named_with_a_link_to_its_readme(name: str) -> None:
    assert f"[{name}](plugins/feature_extraction_server-models-{name}/README.md)" in README


@pytest.mark.parametrize("name", [name for kind, name in PLUGINS if kind == "models"])
def test_every_model_has_a_line_in_the_table_of_all_models(name: str) -> None:
    table = README.split("### All models", 1)[1].split("\n#", 1)[0]

    assert re.search(rf"^\| `{name}` \|", table, re.MULTILINE)


@pytest.mark.parametrize("name", [name for kind, name in PLUGINS if kind == "models" and wants_installation(name)])
def test_model_whose_library_is_installed_by_hand_is_told_among_dependencies_and_models(name: str) -> None:
    link = f"](plugins/feature_extraction_server-models-{name}/README.md)"
    dependencies = README.split("pip install -r dev_requirements.txt", 1)[1].split("**Run the server:**", 1)[0]
    (row,) = re.findall(rf"^\| `{name}` \|.*$", README, re.MULTILINE)

    assert link in dependencies
    assert link in row


@pytest.mark.parametrize("name", [name for kind, name in PLUGINS if kind == "tasks"])
def test_every_task_is_named(name: str) -> None:
    assert f"`{name}`" in README


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_link_leads_somewhere(document: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text())

    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []


def test_every_file_and_folder_that_contributors_are_told_of_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    core = ROOT / "feature_extraction_server-core" / "feature_extraction_server"
    told = re.findall(
        r"`((?:core|flask|tests|plugins|docker|demo|plugins_to_install|feature_extraction_server-core)/[\w./-]*)`", text
    )

    assert told
    assert [path for path in told if not (ROOT / path).exists() and not (core / path).exists()] == []
