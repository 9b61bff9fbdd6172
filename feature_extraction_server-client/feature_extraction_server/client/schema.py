"""A task's JSON schema, read as far as a command line and a new plugin need it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["image", "audio", "text", "strings", "object", "json"]


@dataclass(frozen=True)
class Field:
    """One key of a task's input. A ``batch`` field takes one value or a list of them."""

    name: str
    kind: Kind
    description: str
    required: bool
    batch: bool

    @property
    def is_medium(self) -> bool:
        return self.kind in ("image", "audio")


def read_fields(input_schema: Mapping[str, Any]) -> list[Field]:
    """Return the keys of a task's input, in the schema's order."""
    required = input_schema.get("required", [])
    return [_read_field(name, schema, name in required) for name, schema in input_schema.get("properties", {}).items()]


def _read_field(name: str, schema: Mapping[str, Any], required: bool) -> Field:
    one, batch = _one_of_batch(schema)
    description = str(schema.get("description") or one.get("description") or name)
    return Field(name, _kind(one), description, required, batch)


def _one_of_batch(schema: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """Return the schema of one value, and whether a list of such values is allowed in its place."""
    alternatives = schema.get("anyOf", [])
    if len(alternatives) > 1 and alternatives[-1].get("type") == "array":
        return alternatives[0], True
    return schema, False


def example_of(output_schema: Mapping[str, Any]) -> Any:
    """Return one item's result as the schema gives an example of it, or the simplest that it allows."""
    one, _ = _one_of_batch(output_schema)
    return _example(one, output_schema.get("$defs", {}))


def _example(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Any:
    if examples := schema.get("examples"):
        return _as_validated(examples[0], schema)
    if "const" in schema:
        return schema["const"]
    if values := schema.get("enum"):
        return values[0]
    if reference := schema.get("$ref"):
        return _example(definitions[reference.rpartition("/")[2]], definitions)
    if alternatives := schema.get("anyOf"):
        return _example(alternatives[0], definitions)
    match schema.get("type"):
        case "string":
            return ""
        case "integer":
            return schema.get("minimum", 0)
        case "number":
            return float(schema.get("minimum", 0))
        case "boolean":
            return False
        case "array" if "prefixItems" in schema:
            return [_example(one, definitions) for one in schema["prefixItems"]]
        case "array":
            return [_example(schema.get("items", {}), definitions)] * schema.get("minItems", 1)
        case "object":
            return {name: _example(one, definitions) for name, one in schema.get("properties", {}).items()}
    return None


def _as_validated(example: Any, schema: Mapping[str, Any]) -> Any:
    """Return an example with the type that its schema gives it: 1 is a float where the type is number."""
    types = [one.get("type") for one in schema.get("anyOf", [schema])]
    if type(example) is int and "number" in types and "integer" not in types:
        return float(example)
    if isinstance(example, list) and "items" in schema:
        return [_as_validated(item, schema["items"]) for item in example]
    return example


def _kind(schema: Mapping[str, Any]) -> Kind:
    medium = str(schema.get("contentMediaType", "")).partition("/")[0]
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if medium == "image":
        return "image"
    if medium == "audio":
        return "audio"
    if "string" in types:
        return "text"
    if "array" in types and schema.get("items", {}).get("type") == "string":
        return "strings"
    if "object" in types:
        return "object"
    return "json"
