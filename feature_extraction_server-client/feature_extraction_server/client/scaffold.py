"""New plugins, written from templates: each works, and passes its test, as it is written."""

from __future__ import annotations

import importlib
import json
import keyword
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, Final

from feature_extraction_server.client.items import UsageError
from feature_extraction_server.client.schema import Field, Kind, example_of, read_fields

#: What each kind of plugin's namespace is called.
KINDS: Final = {"model": "models", "task": "tasks", "api": "apis", "consumer": "consumers"}

# Other names make no distribution that can be installed, or no module.
_NAME: Final = re.compile(r"[a-z]([a-z0-9_]*[a-z0-9])?")
# What the server has already: its own consumers, what it reads of a model's module besides the tasks' functions, and
# the setting DEFAULT_CONSUMER_TYPE.
_TAKEN: Final = {
    "consumer": {"process_consumer", "single_thread_consumer"},
    "task": {
        "add_settings",
        "checkpoint",
        "config_types",
        "consumer_type",
        "image_sizes",
        "load_model",
        "provenance",
        "samples",
        "unload_model",
    },
    "model": {"default"},
}
_TEMPLATES: Final = Path(__file__).parent / "templates"
# For each kind of field: what the model's function receives, what a test sends, what the command takes.
_FIELD_CODE: Final[dict[Kind, tuple[str, str, str]]] = {
    "image": ("Image", "picture()", "picture.png"),
    "audio": ("Audio", "recording()", "recording.wav"),
    "text": ("str", '"some words"', "'some words'"),
    "strings": ("list[str]", '["cat", "dog"]', "cat,dog"),
    "object": ("dict[str, Any]", "{}", "'{}'"),
    "json": ("Any", "1", "1"),
}
# What a test asks of a result where that is not its type: JSON does not tell a tuple from a list.
_RESULT_CLASSES: Final = {"list": "list | tuple", "Any": "object"}
_LINE_WIDTH: Final = 80


def new_plugin(
    kind: str, name: str, directory: str, task: str | None, schemas_of: Callable[[str], Mapping[str, Any]]
) -> Path:
    """Write a plugin's folder and return it.

    Args:
        kind: one of ``KINDS``.
        name: the module's; a consumer's may lack its ending ``_consumer``.
        task: what a model implements; None for the other kinds.
        schemas_of: asked for a task's ``input`` and ``output`` schema where the task is not installed here.

    Raises:
        UsageError: the name is none, or taken, the task is missing or does not fit, or the folder exists.
        OSError: the folder cannot be written; nothing of it is left.
    """
    short_name = name.removesuffix("_consumer") if kind == "consumer" else name
    module = f"{short_name}_consumer" if kind == "consumer" else name
    if not _NAME.fullmatch(short_name) or keyword.iskeyword(module):
        raise UsageError(f"{name!r} cannot be a plugin's name: choose one like my_{kind}")
    if module in _TAKEN.get(kind, ()):
        raise UsageError(f"no new {kind} can be called {module}: the server uses this name for something else")
    if kind == "model" and task is None:
        raise UsageError("name the task that the model implements by --task")
    if kind != "model" and task is not None:
        raise UsageError("--task is for models alone")
    distribution = f"feature_extraction_server-{KINDS[kind]}-{short_name}"
    words = {"kind": kind, "name": module, "namespace": KINDS[kind], "distribution": distribution}
    words["title"] = module.replace("_", " ").capitalize()
    if task is not None:
        words |= _words_of_model(module, task, _installed_schemas(task) or schemas_of(task))
    texts = {
        "pyproject.toml": _fill("pyproject.toml", words),
        "README.md": _fill(f"{kind}.md", words),
        f"feature_extraction_server/{KINDS[kind]}/{module}.py": _fill(f"{kind}.py", words),
        f"tests/test_{module}.py": _fill(f"{kind}_test.py", words),
    }
    folder = Path(directory) / distribution
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UsageError(f"{folder} exists already") from None
    _write_files(folder, texts)
    return folder


def _write_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Write a new folder's files. Where that fails, the folder is removed, so that it can be tried again."""
    try:
        for file, text in texts.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text, encoding="utf-8")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        error.filename = error.filename or str(folder)  # a full disk's error names no file
        raise


def _fill(template: str, words: Mapping[str, str]) -> str:
    return Template((_TEMPLATES / f"{template}.template").read_text(encoding="utf-8")).substitute(words)


def _installed_schemas(task: str) -> Mapping[str, Any] | None:
    """Return the schemas of a task, as JSON gives them; None where its plugin is not installed here.

    Raises:
        UsageError: the plugin is broken.
    """
    name = f"feature_extraction_server.tasks.{task}"
    try:
        spec: Any = getattr(importlib.import_module(name).wrap, "__self__", None)
        if not hasattr(spec, "output_schema"):
            return {"input": {}, "output": {}}  # its wrap is written by hand
        schemas: dict[str, Any] = json.loads(json.dumps({"input": spec.input_schema(), "output": spec.output_schema()}))
        return schemas
    except Exception as error:  # a plugin may raise anything
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            return None
        raise UsageError(f"the task {task} cannot be read: {type(error).__name__}: {error}") from None


def _words_of_model(name: str, task: str, schemas: Mapping[str, Any]) -> dict[str, str]:
    fields = sorted(read_fields(schemas["input"]), key=lambda field: not _is_always_given(field))
    needed = [field for field in fields if field.required]
    batch_field = next((field.name for field in needed if field.batch), None)
    if batch_field is None:
        raise UsageError(f"the task {task} declares no batch fields: its model's function cannot be written from them")
    for field in fields:
        if not field.name.isidentifier() or keyword.iskeyword(field.name):
            raise UsageError(f"the task {task} has a field {field.name!r}: no Python parameter can be called so")
    example, result = example_of(schemas["output"]), "_answer"
    result_type = _type_of(example)
    result_class = result_type.partition("[")[0]
    catalogue = next((field.name for field in fields if field.kind == "strings"), None)
    if catalogue is not None and result_type == "list[float]":
        example, result = 1.0, f"[_answer / len({catalogue})] * len({catalogue})"
    return {
        "task": task,
        "class_name": "".join(part.capitalize() for part in name.split("_")) + "Config",
        "answer_type": _type_of(example),
        "answer": _literal(example, indent=4, column=len("    _answer = ")),
        "parameters": "".join(f"    {_parameter(field)},\n" for field in fields),
        "result_type": result_type,
        "result_class": _RESULT_CLASSES.get(result_class, result_class),
        "result": result,
        "batch_field": batch_field,
        "request": _request(needed, "{}"),
        "batch_request": _request(needed, "[{}] * 3"),
        "example_options": "".join(f" --{field.name} {_FIELD_CODE[field.kind][2]}" for field in needed),
    } | _words_of_media({field.kind for field in fields})


def _words_of_media(kinds: set[Kind]) -> dict[str, str]:
    image, audio = "image" in kinds, "audio" in kinds
    modules = (["base64", "io"] if image or audio else []) + (["wave"] if audio else [])
    return {
        "standard_imports": "".join(f"import {module}\n" for module in modules),
        "pillow_import": "from PIL import Image\n" if image else "",
        "image_import": "\nfrom PIL.Image import Image\n" if image else "",
        "audio_import": "from feature_extraction_server.core.media import Audio\n" if audio else "",
        "media_functions": (_fill("picture.py", {}) if image else "") + (_fill("recording.py", {}) if audio else ""),
    }


def _is_always_given(field: Field) -> bool:
    return field.required or field.name == "config"


def _parameter(field: Field) -> str:
    one = _FIELD_CODE[field.kind][0]
    many = f"list[{one}]" if field.batch else one
    return f"{field.name}: {many}" if _is_always_given(field) else f"{field.name}: {many} | None = None"


def _request(fields: Sequence[Field], batch: str) -> str:
    values = {field.name: (batch if field.batch else "{}").format(_FIELD_CODE[field.kind][1]) for field in fields}
    return "".join(f'        "{name}": {value},\n' for name, value in values.items())


def _type_of(value: Any) -> str:
    if isinstance(value, list):
        kinds = {_type_of(item) for item in value}
        return f"list[{kinds.pop() if len(kinds) == 1 else 'Any'}]"
    if isinstance(value, dict):
        return "dict[str, Any]"
    return type(value).__name__ if isinstance(value, str | int | float) else "Any"


def _literal(value: Any, indent: int, column: int) -> str:
    """Return Python code for a JSON value that begins at a column, in lines that are not too long."""
    if isinstance(value, list):
        opening, closing, parts = "[", "]", [("", item) for item in value]
    elif isinstance(value, dict):
        opening, closing, parts = "{", "}", [(f"{json.dumps(key)}: ", item) for key, item in value.items()]
    else:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    line = opening + ", ".join(key + _literal(item, 0, 0) for key, item in parts) + closing
    if "\n" not in line and column + len(line) <= _LINE_WIDTH:
        return line
    inner = indent + 4
    lines = [f"{' ' * inner}{key}{_literal(item, inner, inner + len(key))},\n" for key, item in parts]
    return f"{opening}\n{''.join(lines)}{' ' * indent}{closing}"
