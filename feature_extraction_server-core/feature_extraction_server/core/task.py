"""The declarative task: its inputs and its output, from which validation, batching and the JSON schema follow.

A task plugin is a few lines:

    task = TaskSpec(
        description="Text captions that describe the visual content of an image.",
        inputs={"image": ImageField("The image that needs captioning"), "config": ConfigField()},
        output=list[str],
    )
    wrap = task.wrap

``wrap(func)`` gives the task's public function. It takes the request body's keys as keyword arguments, decodes them on
the calling thread, calls ``func`` once with a list for every batch field, and gives one checked, JSON-ready result, or
a list of them in batch mode.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final

from pydantic import Field as PydanticField
from pydantic import TypeAdapter, ValidationError

from feature_extraction_server.core import media, pixels
from feature_extraction_server.core.errors import InvalidInput, ModelError, TooLarge
from feature_extraction_server.core.url_fetch import UrlFetcher, is_url
from feature_extraction_server.core.wire import SCALARS

if TYPE_CHECKING:
    from feature_extraction_server.core.result_cache import CachedRequest

FiniteFloat = Annotated[float, PydanticField(allow_inf_nan=False)]
Probability = Annotated[float, PydanticField(ge=0, le=1)]

JsonSchema = dict[str, Any]

# 8 x 8 red pixels, and 12 samples.
_EXAMPLE_IMAGE: Final = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEUlEQVR42mP8z4AdMDEMKQkAzUEBD7t4NqoAAAAASUVORK5CYII="
)
_EXAMPLE_AUDIO: Final = "UklGRjAAAABXQVZFZm10IBAAAAABAAEAQB8AAEAfAAABAAgAZGF0YQwAAACAoIBggKCAYICggGA="


_URLS_OFF: Final = UrlFetcher()


@dataclass(frozen=True)
class Limits:
    """What one request may ask for: pixels an image, seconds a recording, items a list, files by URL.

    ``max_decoded_bytes``: what its images (4 bytes a pixel) and recordings (4 bytes a sample) may take all together.
    ``draft_size``: JPEGs may be decoded at a fraction of their size that leaves no side with fewer pixels.
    """

    max_image_pixels: int = 178_956_970
    max_audio_seconds: float = 14_400
    max_items: int = 1024
    max_decoded_bytes: int = 4 << 30
    urls: UrlFetcher = _URLS_OFF
    draft_size: int | None = None


@dataclass(frozen=True)
class InputField:
    """One key of a task's input.

    A ``batch`` field takes one value or a list of them; any other is sent once for the whole request.
    """

    description: str
    required: bool = True
    batch: ClassVar[bool] = True
    schema: ClassVar[JsonSchema] = {}

    def decode(self, value: Any, field: str, limits: Limits) -> Any:
        """Turn one JSON value into what the model receives.

        Raises:
            InvalidInput: the value does not fit; the error names ``field``.
        """
        raise NotImplementedError

    def check(self, value: Any, field: str, limits: Limits) -> None:
        """Check what can be told of a value in little time.

        Raises:
            InvalidInput: ``decode`` would raise it, too.
        """
        self.decode(value, field, limits)

    def content(self, value: Any, field: str) -> bytes:
        """Return what a value of a batch field is, however it was sent; equal ones are decoded to the same.

        Raises:
            InvalidInput: ``decode`` would raise it, too.
        """
        return json.dumps(value, sort_keys=True).encode()


class TextField(InputField):
    """A text; the model receives a ``str``."""

    schema: ClassVar[JsonSchema] = {"type": "string", "examples": ["a picture of"]}

    def decode(self, value: Any, field: str, limits: Limits) -> str:
        return _text(value, field)


class MediaField(InputField):
    """A file: its bytes, base64 or URL."""

    #: What its content type begins with.
    medium: ClassVar[str]

    @staticmethod
    def n_bytes(item: Any) -> int:
        """Return how much memory a decoded file takes."""
        raise NotImplementedError

    def check(self, value: Any, field: str, limits: Limits) -> None:
        _file(value, field)

    def content(self, value: Any, field: str) -> bytes:
        return media.file_of(_file(value, field), field)


class ImageField(MediaField):
    """An image's file; the model receives an RGB ``PIL.Image.Image``."""

    medium = "image"

    schema: ClassVar[JsonSchema] = {
        "type": "string",
        "contentEncoding": "base64",
        "contentMediaType": "image/*",
        "description": "An image file in base64, optionally with a data URL prefix, or its URL",
        "examples": [_EXAMPLE_IMAGE],
    }

    @staticmethod
    def n_bytes(item: Any) -> int:
        return pixels.n_bytes(item.size)

    def decode(self, value: Any, field: str, limits: Limits) -> Any:
        n_bytes = limits.max_decoded_bytes
        return media.decode_image(_file(value, field), field, limits.max_image_pixels, limits.draft_size, n_bytes)


class AudioField(MediaField):
    """A recording's file; the model receives a ``media.Audio``."""

    medium = "audio"

    schema: ClassVar[JsonSchema] = {
        "type": "string",
        "contentEncoding": "base64",
        "contentMediaType": "audio/*",
        "description": "An audio file in base64, optionally with a data URL prefix, or its URL",
        "examples": [_EXAMPLE_AUDIO],
    }

    @staticmethod
    def n_bytes(item: Any) -> int:
        return int(item.n_bytes)

    def decode(self, value: Any, field: str, limits: Limits) -> media.Audio:
        return media.decode_audio(_file(value, field), field, limits.max_audio_seconds, limits.max_decoded_bytes)


class StringListField(InputField):
    """A list of at least one string, the same for every item of the request."""

    batch: ClassVar[bool] = False
    schema: ClassVar[JsonSchema] = {
        "type": "array",
        "items": {"type": "string"},
        "minItems": 1,
        "examples": [["cat", "dog"]],
    }

    def decode(self, value: Any, field: str, limits: Limits) -> list[str]:
        if not isinstance(value, list):
            raise InvalidInput(f"{field} must be a list of strings, not {_kind(value)}", field=field)
        if not value:
            raise InvalidInput(f"{field} is empty: it must hold at least one string", field=field)
        _check_length(value, field, limits)
        return [_text(element, f"{field}[{index}]") for index, element in enumerate(value)]


@dataclass(frozen=True)
class ConfigField(InputField):
    """Arguments of the model's own, the same for every item of the request. Absent and null mean none."""

    description: str = "Any additional arguments (depending on the model)"
    required: bool = False
    batch: ClassVar[bool] = False
    schema: ClassVar[JsonSchema] = {"type": ["object", "null"], "examples": [{}]}

    def decode(self, value: Any, field: str, limits: Limits) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise InvalidInput(f"{field} must be an object, not {_kind(value)}", field=field)
        return value


class TaskSpec:
    """A task's input/output specification.

    Args:
        description: what the task does, for people.
        inputs: the input's keys. A key ``config`` reaches the model as a dict, empty where the client sent none.
        output: the type of one item's result, as pydantic reads it (``list[str]``, a ``TypedDict``).
        example: one item's result, for the documentation.
        postprocess: ``postprocess(result, inputs)`` gives the item's final result from the model's and the item's own
            decoded inputs; it raises ValueError where the model broke the task's promise.
    """

    def __init__(
        self,
        *,
        description: str,
        inputs: Mapping[str, InputField],
        output: Any,
        example: Any = None,
        postprocess: Callable[[Any, dict[str, Any]], Any] | None = None,
    ) -> None:
        self.description: Final = description
        self.inputs: Final = dict(inputs)
        self.output: Final = output
        self.example: Final = example
        self.batch_fields: Final = tuple(key for key, field in self.inputs.items() if field.batch)
        self._media_fields = tuple(key for key, field in self.inputs.items() if isinstance(field, MediaField))
        self._postprocess = postprocess
        if not self.batch_fields:
            raise ValueError("a task needs at least one batch field")

    @cached_property
    def _output_adapter(self) -> TypeAdapter[Any]:
        # Made on first use: building one costs milliseconds, which start-up need not pay for every task.
        return TypeAdapter(self.output)

    def wrap(self, func: Callable[..., list[Any]]) -> Callable[..., Any]:
        """Turn a model's batch function into the task's public function.

        ``func`` may carry attributes ``limits``, ``cached`` (a ``CachedRequest``) and ``call_in_parts``, which calls it
        with pictures and recordings that are decoded only when they are needed. The public function raises InvalidInput
        or TooLarge for what the client got wrong, ModelError where ``func`` broke the task's contract, and whatever
        ``func`` raises.
        """
        limits = getattr(func, "limits", Limits())
        cached: CachedRequest | None = getattr(func, "cached", None)
        call_in_parts: Any = getattr(func, "call_in_parts", None)

        def compute(payload: Mapping[str, Any], places: Sequence[int]) -> list[Any]:
            may_wait = self._media_fields if places and call_in_parts is not None else ()
            later = [key for key in may_wait if payload.get(key) is not None]
            arguments = self._decode(payload, [key for key in self.inputs if key not in later], limits, places)

            def rest() -> dict[str, Any]:
                decoded = self._decode(payload, later, limits, places)
                arguments.update(decoded)
                return decoded

            if not places:
                return []
            results = call_in_parts(dict(arguments), len(places), rest) if later else func(**arguments)
            return self._finish(results, arguments, len(places))

        def run(**payload: Any) -> Any:
            self._check_keys(payload)
            places = range(self._count_items(payload, limits))
            payload = self._with_files(payload, limits)
            if cached is None:
                results = compute(payload, places)
            else:
                keys = self._keys(func.__name__, payload, limits)
                results = cached.complete(keys, partial(compute, payload))
            return results if is_batch(self, payload) else results[0]

        return run

    def check(self, payload: Mapping[str, Any], limits: Limits) -> int | None:
        """Check an input as far as that takes little time. Return how many items it has in batch mode, else None.

        Raises:
            InvalidInput, TooLarge: as the public function does.
        """
        self._check_keys(payload)
        n_items = self._count_items(payload, limits)
        for key, field in self.inputs.items():
            value = payload.get(key)
            if field.batch and isinstance(value, list):
                for index, item in enumerate(value):
                    field.check(item, f"{key}[{index}]", limits)
            elif value is not None:
                field.check(value, key, limits)
        return n_items if is_batch(self, payload) else None

    def input_schema(self) -> JsonSchema:
        """Return the JSON schema of the request body."""
        properties = {key: self._field_schema(field) for key, field in self.inputs.items()}
        required = [key for key, field in self.inputs.items() if field.required]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    def output_schema(self) -> JsonSchema:
        """Return the JSON schema of the answer: one result, or a list of them in batch mode."""
        one = self._output_adapter.json_schema(mode="serialization")
        if self.example is not None:
            one["examples"] = [self.example]
        definitions = one.pop("$defs", None)
        schema: JsonSchema = {"anyOf": [one, {"type": "array", "items": one}]}
        return schema | ({"$defs": definitions} if definitions else {})

    def _field_schema(self, field: InputField) -> JsonSchema:
        described = {"description": field.description}
        if field.batch:
            return described | {"anyOf": [field.schema, {"type": "array", "items": field.schema}]}
        return field.schema | described

    def _check_keys(self, payload: Mapping[str, Any]) -> None:
        for key in payload:
            if key not in self.inputs:
                known = ", ".join(self.inputs)
                raise InvalidInput(f"unknown key {_shorten(key)!r}: this task takes {known}", field=_shorten(key))
        for key, field in self.inputs.items():
            if field.required and payload.get(key) is None:
                raise InvalidInput(f"the key {key!r} is missing: {field.description}", field=key)

    def _keys(self, name: str, payload: Mapping[str, Any], limits: Limits) -> list[bytes]:
        """Return for each item a digest of all that its result depends on, but the model; files are there as bytes."""
        n_items = self._count_items(payload, limits)
        rest = [key for key in self.inputs if key not in self.batch_fields]
        shared = {
            key: self.inputs[key].decode(payload.get(key), key, limits)
            for key in rest
            if payload.get(key) is not None or isinstance(self.inputs[key], ConfigField)
        }
        hashes = [blake2b(batch_key({"task": name, "shared": shared}).encode(), digest_size=32) for _ in range(n_items)]
        for key in self.batch_fields:
            value, field = payload.get(key), self.inputs[key]
            one = None if isinstance(value, list) or value is None else field.content(value, key)
            for place, digest in enumerate(hashes):
                content = field.content(value[place], f"{key}[{place}]") if isinstance(value, list) else one
                digest.update(b"-" if content is None else b"+%d:" % len(content))
                digest.update(content or b"")
        return [digest.digest() for digest in hashes]

    def _decode(
        self, payload: Mapping[str, Any], keys: Iterable[str], limits: Limits, places: Sequence[int]
    ) -> dict[str, Any]:
        """Decode fields; batch fields become lists of one length (a single value stands for all items).

        Args:
            places: of which items.
        """
        arguments: dict[str, Any] = {}
        for key in keys:
            value, field = payload.get(key), self.inputs[key]
            if value is None and not isinstance(field, ConfigField):
                continue
            if not field.batch:
                arguments[key] = field.decode(value, key, limits)
            elif isinstance(value, list):
                arguments[key], limits = _decode_list(field, key, value, places, limits)
            else:
                arguments[key] = [field.decode(value, key, limits)] * len(places)
        return arguments

    def _with_files(self, payload: dict[str, Any], limits: Limits) -> dict[str, Any]:
        """Put files' bytes in the place of their base64 and of their URLs."""
        items: dict[str, Any] = {}
        for key in self._media_fields:
            value = payload.get(key)
            if isinstance(value, list):
                items |= {f"{key}[{i}]": item for i, item in enumerate(value)}
            elif value is not None:
                items[key] = value
        urls = {place: item for place, item in items.items() if is_url(item)}
        if urls:
            items |= limits.urls.fetch_all(urls)
        files = {place: media.file_of(_file(item, place), place) for place, item in items.items()}
        return payload | {
            key: [files[f"{key}[{i}]"] for i in range(len(value))] if isinstance(value, list) else files[key]
            for key in self._media_fields
            if (value := payload.get(key)) is not None
        }

    def _count_items(self, payload: Mapping[str, Any], limits: Limits) -> int:
        lists = {key: payload[key] for key in self.batch_fields if isinstance(payload.get(key), list)}
        for key, value in lists.items():
            _check_length(value, key, limits)
        lengths = {key: len(value) for key, value in lists.items()}
        if len(set(lengths.values())) > 1:
            stated = ", ".join(f"{key} has {length}" for key, length in lengths.items())
            raise InvalidInput(f"lists of one request must be equally long: {stated}", field=list(lengths)[-1])
        return next(iter(lengths.values()), 1)

    def _finish(self, results: list[Any], arguments: dict[str, Any], n_items: int) -> list[Any]:
        if len(results) != n_items:
            raise ModelError(f"the model gave {len(results)} results for {n_items} items")
        return [self._finish_item(result, arguments, index) for index, result in enumerate(results)]

    def _finish_item(self, result: Any, arguments: dict[str, Any], index: int) -> Any:
        try:
            checked = self._output_adapter.validate_python(_plain(result))
            if self._postprocess is None:
                return checked
            item = {key: value[index] if self.inputs[key].batch else value for key, value in arguments.items()}
            return self._postprocess(checked, item)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = "".join(f"[{part}]" for part in first["loc"])
            raise ModelError(f"the model's result breaks the task's contract: result{place}: {first['msg']}") from None
        except ValueError as error:
            raise ModelError(f"the model's result breaks the task's contract: {error}") from None


def _decode_list(
    field: InputField, key: str, values: list[Any], places: Sequence[int], limits: Limits
) -> tuple[list[Any], Limits]:
    """Return the items at some places of a list, decoded, and what the rest of the request may ask for."""
    items = []
    for place in places:
        item = field.decode(values[place], f"{key}[{place}]", limits)
        items.append(item)
        if isinstance(field, MediaField):
            limits = replace(limits, max_decoded_bytes=limits.max_decoded_bytes - field.n_bytes(item))
    return items, limits


def is_batch(task: TaskSpec, payload: Mapping[str, Any]) -> bool:
    """Tell whether a request is in batch mode: a list in any batch field."""
    return any(isinstance(payload.get(key), list) for key in task.batch_fields)


def batch_key(arguments: Mapping[str, Any]) -> str:
    """Return a text that is equal for jobs whose non-batch arguments are (1, 1.0 and true are three different ones)."""
    return json.dumps(arguments, sort_keys=True, default=repr)


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise InvalidInput(f"{field} must be a string, not {_kind(value)}", field=field)
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, tokenizers and decoders choke on it
        raise InvalidInput(f"{field} holds an unpaired surrogate, which is no text", field=field) from None
    return value


def _file(value: Any, field: str) -> str | bytes:
    return value if isinstance(value, bytes) else _text(value, field)


def _check_length(value: list[Any], field: str, limits: Limits) -> None:
    if len(value) > limits.max_items:
        raise TooLarge(
            f"{field} holds {len(value)} items; at most {limits.max_items} are allowed (MAX_ITEMS)", field=field
        )


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "a list", dict: "an object", bytes: "a file"}
    return names.get(type(value), "a number")


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "..."


def _plain(value: Any) -> Any:
    """Turn arrays, tensors and their scalars, wherever they stand in a result, into Python numbers and lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(element) for key, element in value.items()}
    if isinstance(value, (list, tuple)):
        if SCALARS.issuperset(map(type, value)):
            return list(value)
        return [_plain(element) for element in value]
    return value
