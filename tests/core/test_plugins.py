"""Discovery: which modules are plugins, what is asked of them, and what happens to those that fail."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from feature_extraction_server.core.plugins import KINDS, discover
from feature_extraction_server.core.settings import SettingsManager

MakePlugin = Callable[[str, str, str], None]

GOOD = {
    "apis": "def add_routes(application_interface, flask_app): pass",
    "consumers": "def start(model, log_server): pass",
    "models": "def load_model(): pass",
    "tasks": "def wrap(func): return func",
}


@pytest.mark.parametrize("kind", KINDS)
def test_module_with_the_required_function_is_a_plugin(plugin: MakePlugin, kind: str) -> None:
    plugin(kind, "zz", GOOD[kind])

    registry = discover(SettingsManager({}))

    assert "zz" in registry.names(kind)
    assert (kind, "zz") not in registry.errors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(1)", "SystemExit: 1"),
        ("x = 1", "it has no function"),
    ],
    ids=["import", "exception", "exit", "no function"],
)
def test_plugin_that_fails_is_left_out_with_its_reason(plugin: MakePlugin, kind: str, source: str, reason: str) -> None:
    plugin(kind, "zz", source)

    registry = discover(SettingsManager({}))

    assert reason in registry.errors[kind, "zz"]
    assert "zz" not in {"apis": registry.apis, "consumers": registry.consumers, "models": registry.models}.get(
        kind, registry.tasks
    )


def test_module_whose_name_begins_with_an_underscore_is_no_plugin(plugin: MakePlugin) -> None:
    plugin("models", "_shared", "raise RuntimeError('imported')")

    assert "_shared" not in discover(SettingsManager({})).names("models")


def test_keyboard_interrupt_at_import_is_not_swallowed(plugin: MakePlugin) -> None:
    plugin("models", "zz", "raise KeyboardInterrupt")

    with pytest.raises(KeyboardInterrupt):
        discover(SettingsManager({}))


def test_settings_of_a_plugin_are_declared(plugin: MakePlugin) -> None:
    plugin(
        "models",
        "zz",
        "def load_model(): pass\n"
        "def add_settings(settings_manager):\n"
        "    global size\n"
        "    size = settings_manager.add_setting(name='ZZ_SIZE', type=int, default=3, description='How large')\n",
    )

    discover(SettingsManager({"ZZ_SIZE": "5"}))

    assert sys.modules["feature_extraction_server.models.zz"].size.get() == 5


def test_setting_that_two_plugins_declare_differently_leaves_the_second_out(plugin: MakePlugin) -> None:
    source = (
        "def load_model(): pass\ndef add_settings(s): s.add_setting(name='ZZ', type=int, default={}, description='')"
    )
    plugin("models", "zz1", source.format(1))
    plugin("models", "zz2", source.format(2))

    registry = discover(SettingsManager({}))

    assert "zz1" in registry.models
    assert "setting ZZ is already declared differently" in registry.errors["models", "zz2"]


def test_model_implements_the_tasks_that_it_has_functions_for(plugin: MakePlugin) -> None:
    plugin("models", "zz", "image_captioning = 1\ndef load_model(): pass\ndef object_detection(image, config): pass\n")

    registry = discover(SettingsManager({}))

    assert registry.tasks_of("zz") == ["object_detection"]
    assert "zz" in registry.models_for("object_detection")
    assert "zz" not in registry.models_for("image_captioning")


def test_declared_task_is_told_from_a_hand_written_one() -> None:
    registry = discover(SettingsManager({}))

    assert registry.spec("image_captioning") is not None
    assert registry.spec("fake_shout") is None


def test_only_the_kinds_that_are_asked_for_are_imported(plugin: MakePlugin) -> None:
    plugin("apis", "zz", "raise RuntimeError('imported')")

    registry = discover(SettingsManager({}), kinds=("consumers", "tasks", "models"))

    assert registry.names("apis") == []


def test_leaving_a_plugin_out_gives_another_registry(plugin: MakePlugin) -> None:
    plugin("apis", "zz", GOOD["apis"])
    registry = discover(SettingsManager({}))

    without = registry.leave_out("apis", "zz", "no routes")

    assert "zz" in registry.apis
    assert "zz" not in without.apis
    assert without.errors["apis", "zz"] == "no routes"
    assert without.tasks == registry.tasks
