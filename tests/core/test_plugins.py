"""Discovery: which modules are plugins, what is asked of them, and what happens to those that fail."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

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
DECLARES = """
def add_settings(settings_manager):
    global half
    half = settings_manager.add_setting(name="HALF_N", type=int, default=2, description="")
    settings_manager.add_check(half.get)
"""


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


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("apis", DECLARES + "    1 / 0\n"),
        ("consumers", DECLARES + "def add_model_settings(settings_manager, models):\n    1 / 0\n"),
    ],
    ids=["add_settings", "add_model_settings"],
)
def test_plugin_that_fails_at_its_settings_leaves_none_behind(plugin: MakePlugin, kind: str, source: str) -> None:
    plugin(kind, "zz", GOOD[kind] + source)
    settings = SettingsManager({"HALF_N": "many"})

    registry = discover(settings)

    assert "ZeroDivisionError" in registry.errors[kind, "zz"]
    assert "HALF_N" not in [setting.name for setting in settings.all()]
    settings.check()


def test_setting_that_another_plugin_has_as_well_stays_when_one_fails(plugin: MakePlugin) -> None:
    plugin("consumers", "aa", GOOD["consumers"] + DECLARES)
    plugin("consumers", "zz", GOOD["consumers"] + DECLARES + "    1 / 0\n")
    settings = SettingsManager({})

    registry = discover(settings)

    assert ("consumers", "zz") in registry.errors
    assert "HALF_N" in [setting.name for setting in settings.all()]


def test_name_of_a_setting_that_was_taken_back_may_be_used_with_another_type(plugin: MakePlugin) -> None:
    plugin("apis", "aa", GOOD["apis"] + DECLARES + "    half.get() / 0\n")
    plugin("apis", "zz", GOOD["apis"] + DECLARES.replace("int, default=2", "str, default=''"))

    discover(SettingsManager({"HALF_N": "7"}))

    assert sys.modules["feature_extraction_server.apis.zz"].half.get() == "7"


def test_model_implements_the_tasks_that_it_has_functions_for(plugin: MakePlugin) -> None:
    plugin("models", "zz", "image_captioning = 1\ndef load_model(): pass\ndef object_detection(image, config): pass\n")

    registry = discover(SettingsManager({}))

    assert registry.tasks_of("zz") == ["object_detection"]
    assert "zz" in registry.models_for("object_detection")
    assert "zz" not in registry.models_for("image_captioning")


@pytest.mark.parametrize(
    ("task", "source", "implements"),
    [
        pytest.param("answer", "from feature_extraction_server.core.ocr import answer", False, id="the core's helper"),
        pytest.param("mean", "from statistics import mean", True, id="a library's"),
        pytest.param("answer", "def answer(text): pass", True, id="its own"),
        pytest.param("answer", "from statistics import mean as answer", True, id="renamed to the task"),
        pytest.param("answer", "from feature_extraction_server.models._beside import answer", True, id="a file beside"),
        pytest.param("answer", "from functools import partial\nanswer = partial(print)", True, id="partial"),
        pytest.param("answer", "class Answer:\n  def __call__(self): pass\nanswer = Answer()", True, id="instance"),
        pytest.param("answer", "class Model:\n  def run(self): pass\nanswer = Model().run", True, id="method"),
        pytest.param(
            "object_detection",
            "from feature_extraction_server.core.detections import of_coco\nobject_detection = of_coco(print)",
            True,
            id="made by the core's factory",
        ),
    ],
)
def test_helper_that_a_model_imports_is_no_implementation_of_a_task(
    plugin: MakePlugin, task: str, source: str, implements: bool
) -> None:
    if task != "object_detection":
        plugin("tasks", task, GOOD["tasks"])
    plugin("models", "_beside", "def answer(text): pass")
    plugin("models", "zz", f"{GOOD['models']}\n{source}\n")

    registry = discover(SettingsManager({}))

    assert registry.tasks_of("zz") == ([task] if implements else [])
    assert ("zz" in registry.models_for(task)) == implements


def test_no_model_implements_a_task_that_is_named_like_a_helper_of_the_core(plugin: MakePlugin) -> None:
    plugin("tasks", "answer", GOOD["tasks"])

    registry = discover(SettingsManager({}))

    assert registry.models_for("answer") == []
    assert {"grounding_dino_tiny", "owlvit_base_patch32"} <= set(registry.models_for("object_detection"))


@pytest.mark.parametrize(
    ("kind", "distribution", "version"),
    [
        ("consumers", "consumers-zz_consumer", "1.2"),
        ("consumers", "consumers-zz", "1.2"),
        ("models", "models-zz_consumer", "1.2"),
        ("models", "models-zz", None),
    ],
)
def test_version_is_that_of_the_distribution_with_the_plugin_s_name(
    plugin: MakePlugin, tmp_path: Path, kind: str, distribution: str, version: str | None
) -> None:
    plugin(kind, "zz_consumer", GOOD[kind])
    metadata = tmp_path / "plugins" / f"feature_extraction_server_{distribution.replace('-', '_')}-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Name: feature_extraction_server-{distribution}\nVersion: 1.2\n")

    assert discover(SettingsManager({})).plugin(kind, "zz_consumer").version == version


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
