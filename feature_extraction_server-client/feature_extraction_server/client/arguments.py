"""The options of the command line, those of a task's own included: they come from its schema."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_extraction_server.client.client import DEFAULT_CONCURRENCY, DEFAULT_TIMEOUT_S, Client
from feature_extraction_server.client.errors import ServerError
from feature_extraction_server.client.items import Item, Value, combine, expand_files, read_text
from feature_extraction_server.client.schema import Field, read_fields


def common_options(*, defaults: bool) -> argparse.ArgumentParser:
    """Return the options that every command has.

    Args:
        defaults: whether options that are not given have a value.
    """

    def default(value: Any) -> Any:
        return value if defaults else argparse.SUPPRESS

    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    group = common.add_argument_group("server and output")
    group.add_argument(
        "--url",
        default=default(os.environ.get("FES_URL") or "http://localhost:5000"),
        help="the server's URL (default: FES_URL, else http://localhost:5000)",
    )
    group.add_argument(
        "--api-key",
        default=default(os.environ.get("FES_API_KEY")),
        metavar="KEY",
        help="the server's API key (default: FES_API_KEY, which other users of the machine cannot see)",
    )
    group.add_argument(
        "--timeout",
        type=_positive(float),
        default=default(DEFAULT_TIMEOUT_S),
        metavar="SECONDS",
        help=f"how long to wait for an answer (default: {DEFAULT_TIMEOUT_S:g})",
    )
    group.add_argument(
        "--json",
        action=argparse.BooleanOptionalAction,
        default=default(None),
        help="print lines of JSON, or text (default: text on a terminal)",
    )
    return common


def batch_options() -> argparse.ArgumentParser:
    """Return the options of commands that run a task."""
    batch = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    batch.add_argument("--model", help="the model (default: the server's default one)")
    batch.add_argument(
        "--concurrency",
        type=_positive(int),
        default=DEFAULT_CONCURRENCY,
        metavar="N",
        help=f"how many requests to have running (default: {DEFAULT_CONCURRENCY})",
    )
    batch.add_argument(
        "--meta", action="store_true", help="tell of each result where it comes from: the weights, the device and more"
    )
    return batch


def config_object(text: str) -> dict[str, Any]:
    """Read a JSON object of the command line."""
    value = _json(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, such as '{{\"num_beams\": 3}}'")
    return value


def string_list(text: str) -> list[str]:
    """Read a list of strings: ``cat,dog`` or a JSON list."""
    value = _json(text) if text.startswith("[") else None
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    return [part.strip() for part in text.split(",")]


@dataclass(frozen=True)
class TaskArguments:
    """What a command line asks of a task."""

    items: list[Item]
    classes: list[str] | None


def read_task_arguments(client: Client, options: argparse.Namespace) -> TaskArguments:
    """Read the options of ``fes run TASK`` by the task's schema, into ``options`` as far as all tasks have them.

    Raises:
        UsageError: the values do not fit together.
        FesError: the server does not tell the schema.
    """
    fields, description = _ask_for_fields(client, options.task)
    parser = argparse.ArgumentParser(
        prog=f"fes run {options.task}",
        description=description,
        parents=[common_options(defaults=False), batch_options()],
        allow_abbrev=False,
        conflict_handler="resolve",
    )
    own = parser.add_argument_group("the task's input")
    for field in fields:
        _add_field(own, field)
    own.add_argument(
        "pairs",
        nargs="*",
        type=_pair,
        metavar="KEY=VALUE",
        help="any key, as a text; KEY=@FILE gives a file, KEY:=JSON another JSON value",
    )
    given = vars(parser.parse_args(options.rest))
    # A field of the same name takes an option's place.
    options.model, options.concurrency = given.get("model"), given.get("concurrency", DEFAULT_CONCURRENCY)
    options.meta = given.get("meta", False)
    return _gather(fields, given)


def _gather(fields: Sequence[Field], given: dict[str, Any]) -> TaskArguments:
    many: dict[str, Sequence[Value]] = {}
    once: dict[str, Any] = {}
    for field in fields:
        value = given.get(_destination(field.name))
        if value is None:
            continue
        if field.is_medium:
            many[field.name] = expand_files(value, field.kind)
        elif field.kind == "text":
            many[field.name] = [read_text(text) for text in value]
        else:
            once[field.name] = value
    for name, value in given["pairs"]:
        many[name] = [*many.get(name, ()), value]
    lists = [once[field.name] for field in fields if field.kind == "strings" and field.name in once]
    return TaskArguments(combine(many, once), lists[0] if lists else None)


def _ask_for_fields(client: Client, task: str) -> tuple[list[Field], str]:
    try:
        described = client.describe_task(task)
    except ServerError as error:
        if error.code != "not_found":
            raise
        return [], "This server does not tell the task's schema: give its input as KEY=VALUE."
    return read_fields(described["input"]), described["description"]


def _add_field(parser: argparse._ArgumentGroup, field: Field) -> None:
    options: dict[str, Any] = {"dest": _destination(field.name)}
    if field.is_medium:
        options |= {"nargs": "+", "action": "extend", "metavar": "FILE"}
    elif field.kind == "text":
        options |= {"action": "append", "metavar": "TEXT"}
    elif field.kind == "strings":
        options |= {"type": string_list, "metavar": "A,B,..."}
    else:
        options |= {"type": config_object if field.kind == "object" else _json, "metavar": "JSON"}
    needed = " (required)" if field.required else ""
    parser.add_argument(f"--{field.name}", help=f"{field.description}{needed}".replace("%", "%%"), **options)


def _destination(name: str) -> str:
    return f"field {name}"


def _pair(text: str) -> tuple[str, Value]:
    name, sign, value = text.partition("=")
    if not sign or not name.strip(":"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither an option of the task nor KEY=VALUE")
    if name.endswith(":"):
        return name[:-1], Value(_json(value), value)
    if value.startswith("@"):
        return name, Value(Path(value[1:]), value[1:])
    return name, Value(value, value)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = 0
        if not number > 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number greater than 0")
        return number

    return read
