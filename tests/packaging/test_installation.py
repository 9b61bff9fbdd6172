"""The core and the plugins, however installed, form one namespace, and gunicorn serves it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from dev_server import ROOT
from tests.conftest import Server
from tests.packaging.conftest import BUILT_IN_CONSUMERS, CORE, PLUGINS, Environment, plugin_name

pytestmark = pytest.mark.packaging


def names(folders: Iterable[Path]) -> set[str]:
    return {plugin_name(folder) for folder in folders}


ALL_PLUGINS = names(PLUGINS)
GUNICORN = (
    "gunicorn -w ${NUMBER_OF_WORKERS:-1} -b :5000 --timeout 600 --preload "
    "'feature_extraction_server.flask.entrypoint:entrypoint()'"
)


def one_of_each_kind_and_another() -> list[Path]:
    """Return two plugins of the first kind, which share a folder of the namespace, and one of each other kind."""
    kinds: dict[str, list[Path]] = {}
    for folder in PLUGINS:
        kinds.setdefault(plugin_name(folder).partition(".")[0], []).append(folder)
    first, *others = (kinds[kind] for kind in sorted(kinds))
    return [*first[:2], *(folders[0] for folders in others)]


SOME_PLUGINS = one_of_each_kind_and_another()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> Environment:
    """An environment with the core and all plugins from wheels. Tests do not change it."""
    environment = Environment(tmp_path_factory.mktemp("installed") / "environment")
    environment.install(*wheels.values(), look_for_dependencies=True)
    return environment


def test_wheels_form_one_namespace(installed: Environment) -> None:
    found = installed.discover()

    assert found.keys() == ALL_PLUGINS
    assert {file.is_relative_to(installed.site_packages) for file in found.values()} == {True}


def test_uninstalling_a_plugin_leaves_the_others(environment: Environment, wheels: dict[str, Path]) -> None:
    removed, *kept = SOME_PLUGINS
    environment.install(*(wheels[folder.name] for folder in [CORE, *SOME_PLUGINS]))

    environment.run("python", "-m", "pip", "uninstall", "--yes", removed.name)

    assert environment.discover().keys() == names(kept)


def test_flit_install_takes_plugins_in_any_order_after_the_core_and_the_core_again(environment: Environment) -> None:
    plugins = SOME_PLUGINS[:2]  # each takes its time

    for folder in [CORE, *reversed(plugins), CORE]:
        environment.run("flit", "install", cwd=folder)

    assert environment.discover().keys() == names(plugins)


def test_folders_installed_by_pip_form_one_namespace(environment: Environment) -> None:
    environment.install(CORE, *SOME_PLUGINS)

    assert environment.discover().keys() == names(SOME_PLUGINS)


def test_editable_installs_form_one_namespace(environment: Environment) -> None:
    environment.install(*(argument for folder in [CORE, *SOME_PLUGINS] for argument in ("--editable", folder)))

    found = environment.discover()

    assert found.keys() == names(SOME_PLUGINS)
    assert {file.is_relative_to(ROOT) for file in found.values()} == {True}


def test_installed_core_finds_editable_plugin_and_plugin_on_pythonpath(
    environment: Environment, wheels: dict[str, Path]
) -> None:
    installed, editable, *on_path = SOME_PLUGINS
    environment.install(wheels[CORE.name], wheels[installed.name], "--editable", editable)

    found = environment.discover(on_path)

    assert found.keys() == names(SOME_PLUGINS)


@pytest.mark.process
@pytest.mark.parametrize("place", ["the checkout", "an empty directory"])
def test_gunicorn_serves_the_installed_plugins(
    installed: Environment, serve: Callable[..., Server], tmp_path: Path, place: str
) -> None:
    folder = ROOT if place == "the checkout" else tmp_path

    server = serve(installed, GUNICORN, folder, NUMBER_OF_WORKERS="2")

    plugins = server.get("/api/plugins").json()
    assert {(plugin["state"], plugin["error"]) for plugin in plugins} == {("loaded", None)}
    assert {f"{plugin['kind']}.{plugin['name']}" for plugin in plugins} == ALL_PLUGINS | BUILT_IN_CONSUMERS
