"""What holds for every plugin in ``plugins/``."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dev_server import ROOT
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.task import TaskSpec
from tests.conftest import PLUGIN_PATH

FOLDERS = sorted((ROOT / "plugins").glob("feature_extraction_server-*"))
HEAVY = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "soundfile", "soxr")


def kind_and_name(folder: Path) -> tuple[str, str]:
    _, kind, name = folder.name.split("-")
    return kind, f"{name}_consumer" if kind == "consumers" else name


def module_name(folder: Path) -> str:
    return ".".join(["feature_extraction_server", *kind_and_name(folder)])


def import_plugin(folder: Path) -> ModuleType:
    return importlib.import_module(module_name(folder))


def readme(folder: Path) -> str:
    return (folder / "README.md").read_text()


def parametrize_folders(*kinds: str) -> pytest.MarkDecorator:
    folders = [folder for folder in FOLDERS if not kinds or kind_and_name(folder)[0] in kinds]
    return pytest.mark.parametrize("folder", folders, ids=lambda folder: folder.name.partition("-")[2])


def tasks() -> dict[str, TaskSpec]:
    folders = [folder for folder in FOLDERS if kind_and_name(folder)[0] == "tasks"]
    return {kind_and_name(folder)[1]: import_plugin(folder).task for folder in folders}


def functions(folder: Path) -> dict[str, Any]:
    """Return a model plugin's task functions."""
    module = import_plugin(folder)
    return {task: getattr(module, task) for task in tasks() if hasattr(module, task)}


@parametrize_folders()
def test_folder_holds_the_one_module_that_it_is_named_for(folder: Path) -> None:
    kind, name = kind_and_name(folder)

    modules = [path.relative_to(folder).as_posix() for path in (folder / "feature_extraction_server").rglob("*.py")]

    assert kind in ("apis", "tasks", "models", "consumers")
    if f"feature_extraction_server/{kind}/{name}/__init__.py" in modules:  # a module that has files beside it
        modules = [path for path in modules if not path.startswith(f"feature_extraction_server/{kind}/{name}/")]
    else:
        modules.remove(f"feature_extraction_server/{kind}/{name}.py")
    assert modules == []


@parametrize_folders()
def test_distribution_has_the_folder_s_name(folder: Path) -> None:
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]

    assert project["name"] == folder.name


@parametrize_folders()
def test_readme_names_the_plugin_s_settings(folder: Path, tmp_path: Path) -> None:
    module = import_plugin(folder)
    settings = SettingsManager({}, tmp_path / ".env")
    if hasattr(module, "add_settings"):
        module.add_settings(settings)

    missing = [setting.name for setting in settings.all() if f"`{setting.name}`" not in readme(folder)]

    assert missing == []


@parametrize_folders("models")
def test_readme_names_the_tasks_and_all_config_keys_with_their_defaults(folder: Path) -> None:
    config_types = import_plugin(folder).config_types
    text = readme(folder)

    missing = [
        key for config_type in config_types.values() for key in config_type.model_fields if f"`{key}`" not in text
    ]

    assert missing == []
    assert [task for task in functions(folder) if f"`{task}`" not in text] == []


@parametrize_folders("models")
def test_readme_s_config_table_has_only_keys_that_exist(folder: Path) -> None:
    known = {key for config_type in import_plugin(folder).config_types.values() for key in config_type.model_fields}
    _, _, section = readme(folder).partition("\n## Config")

    keys = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))

    assert keys == known


@parametrize_folders("models")
def test_readme_names_the_default_checkpoint_and_its_licence(folder: Path, tmp_path: Path) -> None:
    settings = SettingsManager({}, tmp_path / ".env")
    module = import_plugin(folder)
    if hasattr(module, "add_settings"):
        module.add_settings(settings)
    checkpoints = [str(setting.default) for setting in settings.all() if setting.name.endswith("_CHECKPOINT")]

    assert len(checkpoints) == 1 or hasattr(module, "provenance")  # which tells of weights that come with a library
    assert [checkpoint for checkpoint in checkpoints if checkpoint not in readme(folder)] == []
    assert re.search(r"licen[cs]e", readme(folder), re.IGNORECASE)


@parametrize_folders("models")
def test_model_s_functions_take_their_task_s_fields(folder: Path) -> None:
    specs = tasks()

    for task, function in functions(folder).items():
        assert list(inspect.signature(function).parameters) == list(specs[task].inputs)


@parametrize_folders("models")
def test_every_task_of_a_model_has_its_config_declared(folder: Path) -> None:
    assert import_plugin(folder).config_types.keys() == functions(folder).keys()


@parametrize_folders("models")
def test_model_that_answers_in_pixels_of_the_image_is_given_none_made_smaller(folder: Path) -> None:
    in_pixels = {task for task, spec in tasks().items() if re.search(r'"box(es)?":', json.dumps(spec.output_schema()))}

    assert in_pixels >= {"object_detection", "optical_character_recognition", "face_embedding"}
    assert in_pixels.isdisjoint(getattr(import_plugin(folder), "image_sizes", {}))


@parametrize_folders("apis", "tasks")
def test_task_or_api_has_the_function_of_its_contract(folder: Path) -> None:
    kind, _ = kind_and_name(folder)

    assert callable(getattr(import_plugin(folder), {"apis": "add_routes", "tasks": "wrap"}[kind]))


def test_importing_the_plugins_loads_no_heavy_library() -> None:
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[2:]:\n"
        "    importlib.import_module(name)\n"
        "    loaded = [heavy for heavy in sys.argv[1].split(',') if heavy in sys.modules]\n"
        "    assert not loaded, f'{name} loads {loaded}'\n"
    )
    names = [module_name(folder) for folder in FOLDERS]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(PLUGIN_PATH)}

    result = subprocess.run(
        [sys.executable, "-c", script, ",".join(HEAVY), *names], env=environment, capture_output=True, text=True
    )

    assert result.returncode == 0, result.stderr
