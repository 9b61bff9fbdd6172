"""From the command line's files and texts to the inputs of single requests."""

from __future__ import annotations

import glob
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from feature_extraction_server.client.media import as_media, content_type_of

_LONGEST_LABEL: Final = 200


class UsageError(Exception):
    """The command line asks for what cannot be. The message is one line."""


@dataclass(frozen=True)
class Value:
    """One value of a field, and how it is called in the output."""

    value: Any
    label: str


@dataclass(frozen=True)
class Item:
    """The input of one request, and what tells it from the others: labels by field."""

    inputs: dict[str, Any]
    labels: dict[str, str]

    @property
    def name(self) -> str:
        return " ".join(
            label if len(label) <= _LONGEST_LABEL else f"{label[:_LONGEST_LABEL]}..." for label in self.labels.values()
        )


def combine(fields: Mapping[str, Sequence[Value]], once: Mapping[str, Any]) -> list[Item]:
    """Return one item for each value; a field with one value gives it to all items.

    Args:
        fields: the fields that differ from item to item.
        once: what every item has besides.

    Raises:
        UsageError: the fields have differently many values.
    """
    lengths = {name: len(values) for name, values in fields.items() if len(values) > 1}
    if len(set(lengths.values())) > 1:
        stated = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise UsageError(f"there must be equally many values of each, or one: {stated}")
    n_items = max(lengths.values(), default=1)
    return [
        _item({name: values[i if len(values) > 1 else 0] for name, values in fields.items()}, once)
        for i in range(n_items)
    ]


def _item(values: Mapping[str, Value], once: Mapping[str, Any]) -> Item:
    inputs = {name: value.value for name, value in values.items()}
    return Item(inputs | dict(once), {name: value.label for name, value in values.items()})


def expand_files(names: Sequence[str], kind: str) -> list[Value]:
    """Return the files that are meant by paths, patterns, folders, URLs and ``-`` (standard input).

    A file that does not exist is its own request's error.

    Args:
        kind: ``image`` or ``audio``, what to take of a folder.

    Raises:
        UsageError: a pattern or a folder yields nothing.
    """
    return [value for name in names for value in _expand(name, kind)]


def _expand(name: str, kind: str) -> list[Value]:
    if name == "-":
        return [Value(sys.stdin.buffer.read(), name)]
    path = as_media(name)
    if not isinstance(path, Path):
        return [Value(name, name if len(name) <= _LONGEST_LABEL else f"{name[:_LONGEST_LABEL]}...")]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and _is_of(kind, file))
    elif glob.has_magic(name) and not path.exists():
        found = sorted(Path(match) for match in glob.glob(name, recursive=True))
    else:
        found = [path]
    if not found:
        raise UsageError(f"there is no {kind} file in {name}" if path.is_dir() else f"no file is called like {name}")
    return [Value(file, str(file)) for file in found]


def _is_of(kind: str, file: Path) -> bool:
    return content_type_of(file.name).startswith(f"{kind}/")


def read_text(text: str) -> Value:
    """Return a text of the command line; ``-`` stands for standard input.

    Raises:
        UsageError: standard input is not UTF-8.
    """
    if text == "-":
        try:
            text = sys.stdin.buffer.read().decode().removeprefix("\ufeff")  # not utf-8-sig, which miscounts the bytes
            text = text.replace("\r\n", "\n").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise UsageError(f"standard input is not UTF-8 text: byte {error.start}") from None
    return Value(text, text)
