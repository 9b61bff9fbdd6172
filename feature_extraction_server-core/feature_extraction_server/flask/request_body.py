"""What a request brings: a JSON object, a multipart form, or one file as the whole body.

Bodies become a task's input by key. Files stay bytes all the way to their decoder: there is no base64, no temporary
file, and no limit but the server's own (MAX_CONTENT_LENGTH, MAX_ITEMS).
"""

from __future__ import annotations

import json
import math
import zlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from typing import IO, Any, Final, NamedTuple

from flask import Request, request
from pydantic_core import from_json
from werkzeug.datastructures import Headers
from werkzeug.exceptions import ClientDisconnected, HTTPException, RequestEntityTooLarge
from werkzeug.http import parse_options_header
from werkzeug.sansio import multipart

from feature_extraction_server.core.application import ApplicationInterface
from feature_extraction_server.core.errors import InvalidInput, TooLarge, UnsupportedMediaType
from feature_extraction_server.core.task import InputField, MediaField, StringListField, TaskSpec

MAX_NESTING: Final = 100
MAX_DIGITS: Final = 300
#: JSON with more commas and brackets is refused before it is parsed: three bytes of it may become a list of 56. Base64
#: has none of them, and a text hardly as many.
MAX_JSON_VALUES: Final = 1_000_000
#: Different fields of a form; how often one may be repeated is MAX_ITEMS.
MAX_FIELDS: Final = 100
#: Kinds of files that may be a body by themselves.
MEDIA: Final = ("image", "audio")
_PIECE_BYTES: Final = 1 << 20
_CHUNK_BYTES: Final = 1 << 16
#: How a body may be compressed, and by which number zlib knows that.
_CODINGS: Final = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_TOO_DEEP: Final = f"nested too deeply; at most {MAX_NESTING} levels are allowed"


def read_task_input(application: ApplicationInterface, task: str, *, reserved: Collection[str] = ()) -> dict[str, Any]:
    """Return the current request's body as a task's input, by key.

    Args:
        reserved: parameters of the query that are the route's own, not the task's input.

    Raises:
        UnsupportedMediaType: the body is of a type that the task does not take.
        TooLarge: it has more than MAX_CONTENT_LENGTH bytes, or a field is repeated more than MAX_ITEMS times.
        InvalidInput: it is malformed, or a part does not fit its field.
    """
    if request.is_json:
        return _read_object()
    return read_form(application, task, reserved=reserved).to_input(task, application.registry.spec(task))


def read_json_object() -> dict[str, Any]:
    """Return the current request's body, which must be a JSON object.

    Raises:
        UnsupportedMediaType: the body is not declared to be JSON.
        TooLarge: it has more than MAX_CONTENT_LENGTH bytes.
        InvalidInput: it is not JSON, or not an object.
    """
    if not request.is_json:
        raise UnsupportedMediaType(
            "the body must be JSON, sent with the header 'Content-Type: application/json' "
            f"(it was sent with: {_given_type()})"
        )
    return _read_object()


def read_form(application: ApplicationInterface, task: str | None = None, *, reserved: Collection[str] = ()) -> Form:
    """Return the current request's multipart form or single file, which may be for a task that is not known yet.

    Args:
        reserved: as for ``read_task_input``.

    Raises:
        UnsupportedMediaType: it is neither, or a file of a kind that the task does not take.
        TooLarge: it has more than MAX_CONTENT_LENGTH bytes, or a field is repeated more than MAX_ITEMS times.
        InvalidInput: it is malformed.
    """
    form = Form(application.limits.max_items)
    if request.mimetype == "multipart/form-data":
        boundary = request.mimetype_params.get("boundary", "")
        for headers, data in _split(read_body(), boundary):
            form.add(*_named_part(headers, data))
        return form
    medium, _, kind = request.mimetype.partition("/")
    media = MEDIA if task is None else _single_media(application.registry.spec(task))
    if not kind or medium not in media:
        raise _not_taken(task, media)
    for name, values in request.args.lists():
        for value in () if name in reserved else values:
            form.add(name, Part(value.encode(), "text"))
    form.medium, form.file = medium, read_body()
    return form


class Part(NamedTuple):
    """One part of a form: its bytes, and whether they are a ``file``, a ``text`` or declared to be ``json``."""

    data: bytes
    kind: str

    def text(self, place: str) -> str:
        try:
            return self.data.decode("utf-8-sig" if self.kind == "file" else "utf-8")
        except UnicodeDecodeError as error:
            raise InvalidInput(f"{place} is not a text: byte {error.start} is not UTF-8", field=place) from None

    def json(self, place: str) -> Any:
        return _parse_json(self.data, place, place)

    def value(self, place: str, *, is_file: bool) -> Any:
        """Return what stands for the part in a task's input. A text where a file belongs is its base64 or its URL."""
        if self.kind == "json":
            return self.json(place)
        return self.data if is_file and self.kind == "file" else self.text(place)


class Form:
    """The parts of a form by name; or the query's parameters, and a file that is the whole body."""

    def __init__(self, max_items: int) -> None:
        self.parts: dict[str, list[Part]] = {}
        self.medium = ""
        self.file: bytes | None = None
        self._lists: set[str] = set()
        self._max_items = max_items

    def add(self, name: str, part: Part) -> None:
        """Add a part. One whose name ends in ``[]`` makes its field a list, even if it stays the only one.

        Raises:
            TooLarge: the field has as many parts as it may have.
            InvalidInput: the form has as many fields as it may have.
        """
        key = name.removesuffix("[]")
        shown = key[:40]
        parts = self.parts.setdefault(key, [])
        parts.append(part)
        if len(parts) > self._max_items:
            message = f"{shown} holds more than {self._max_items} items, the most that are allowed (MAX_ITEMS)"
            raise TooLarge(message, field=shown)
        if len(parts) > 1 or key != name:
            self._lists.add(key)
        if len(self.parts) > MAX_FIELDS:
            raise InvalidInput(f"the form has more than {MAX_FIELDS} different fields")

    def pop_text(self, name: str) -> str | None:
        """Take a text out of the form, or None where it is not there.

        Raises:
            InvalidInput: it is there more than once.
        """
        parts = self.parts.pop(name, None)
        if parts is None:
            return None
        return _only(parts, name).text(name)

    def to_input(self, task: str, spec: TaskSpec | None) -> dict[str, Any]:
        """Return the form as a task's input, by key.

        A task that declares no fields gets files as bytes and everything else as texts, lists of them where a name is
        repeated.

        Raises:
            UnsupportedMediaType: a single file is of a kind that the task does not take.
            InvalidInput: a part does not fit its field.
        """
        fields: dict[str, InputField] = {} if spec is None else spec.inputs
        found = {key: self._value(key, parts, fields.get(key)) for key, parts in self.parts.items()}
        if self.file is None:
            return found
        media = _single_media(spec)
        if self.medium not in media:
            raise _not_taken(task, media)
        key = media[self.medium]
        if key in found:
            raise InvalidInput(f"{key} is given twice: as the body and in the query", field=key)
        return found | {key: self.file}

    def _value(self, key: str, parts: list[Part], field: InputField | None) -> Any:
        if isinstance(field, StringListField):
            return _string_list(key, parts)
        if field is not None and not field.batch:
            return _only(parts, key).json(key)
        is_file = field is None or isinstance(field, MediaField)
        if key not in self._lists:
            return parts[0].value(key, is_file=is_file)
        return [part.value(f"{key}[{index}]", is_file=is_file) for index, part in enumerate(parts)]


def _string_list(key: str, parts: list[Part]) -> Any:
    """Read a list of strings: one part that holds a JSON list, or one string a part."""
    if len(parts) == 1 and (parts[0].kind == "json" or parts[0].data.lstrip()[:1] == b"["):
        return parts[0].json(key)
    return [part.text(f"{key}[{index}]") for index, part in enumerate(parts)]


def _only(parts: list[Part], name: str) -> Part:
    if len(parts) > 1:
        raise InvalidInput(f"{name} is given {len(parts)} times, but holds for the whole request", field=name)
    return parts[0]


def _single_media(spec: TaskSpec | None) -> dict[str, str]:
    """Return the key for each kind of file that a task takes under one key alone."""
    inputs = {} if spec is None else spec.inputs
    found = [(field.medium, key) for key, field in inputs.items() if isinstance(field, MediaField)]
    return {medium: key for medium, key in found if [other for other, _ in found].count(medium) == 1}


def _not_taken(task: str | None, media: Iterable[str]) -> UnsupportedMediaType:
    files = [f"one file ({medium}/*)" for medium in media]
    kinds = ["JSON (application/json)", "a form (multipart/form-data)", *files]
    return UnsupportedMediaType(
        f"the body for {f'the task {task}' if task else 'a task'} must be {', '.join(kinds[:-1])} or {kinds[-1]}, "
        f"and the header Content-Type must say which (it was sent with: {_given_type()})"
    )


def _given_type() -> str:
    return request.mimetype[:80] or "none"


# Reading


def _read_object() -> dict[str, Any]:
    body = _parse_json(read_body(), "the body")
    if not isinstance(body, dict):
        raise InvalidInput("the body must be a JSON object whose keys are the task's input")
    return body


def read_body() -> bytes:
    """Return the current request's body, whatever it is, decompressed.

    Raises:
        UnsupportedMediaType: it is compressed in a way that the server does not know.
        TooLarge: it has more than MAX_CONTENT_LENGTH bytes, as it came or decompressed.
        InvalidInput: it cannot be read.
    """
    asked: Request = request._get_current_object()  # type: ignore[attr-defined]  # once, since it takes its time
    n_bytes, at_most, stream = asked.content_length, asked.max_content_length, asked.environ["wsgi.input"]
    is_too_large = n_bytes is not None and at_most is not None and n_bytes > at_most
    try:
        if n_bytes is None:
            data = asked.get_data(cache=False)
            # Werkzeug cuts a body of undeclared length off at the limit, without a word.
            is_too_large = len(data) == at_most and bool(stream.read(1))
        elif not is_too_large:
            data = _read(stream, n_bytes)
            if len(data) < n_bytes:
                raise ClientDisconnected()
    except ClientDisconnected:
        whole = "it" if n_bytes is None else f"its {n_bytes} bytes"
        raise InvalidInput(f"the body ended before all of {whole} had come") from None
    except HTTPException:
        raise
    except Exception as error:  # the server has errors of its own for malformed chunks
        raise InvalidInput(f"the body cannot be read: {type(error).__name__}") from None
    if is_too_large:
        raise body_too_large()
    if (coding := asked.environ.get("HTTP_CONTENT_ENCODING", "identity").strip().lower()) != "identity":
        return _decompress(data, coding, at_most)
    return data


def _decompress(data: bytes, coding: str, at_most: int | None) -> bytes:
    if coding not in _CODINGS:
        raise UnsupportedMediaType(
            f"the body is sent with 'Content-Encoding: {coding[:40]}'; the server takes gzip, deflate or none"
        )
    decoder = zlib.decompressobj(_CODINGS[coding])
    try:
        decompressed = decoder.decompress(data, 0 if at_most is None else at_most + 1)
    except zlib.error:
        raise InvalidInput(f"the body is not valid {coding}, as its header Content-Encoding says it is") from None
    if at_most is not None and len(decompressed) > at_most:
        raise body_too_large()
    if not decoder.eof:
        raise InvalidInput(f"the body ended before all of its {coding} had come")
    if decoder.unused_data:
        raise InvalidInput(f"the body goes on after the end of its {coding}")
    return decompressed


def _read(stream: IO[bytes], n_bytes: int) -> bytes:
    """Read so many bytes. Werkzeug itself would in pieces of 64 KiB, and gunicorn copies what is left for each."""
    pieces = []
    while n_bytes > 0 and (piece := stream.read(min(n_bytes, _PIECE_BYTES))):
        pieces.append(piece)
        n_bytes -= len(piece)
    return b"".join(pieces)


def body_too_large() -> TooLarge:
    """Return the error of a body with more bytes than MAX_CONTENT_LENGTH."""
    return TooLarge(f"the body has more than {request.max_content_length} bytes (MAX_CONTENT_LENGTH)")


def _split(body: bytes, boundary: str) -> Iterator[tuple[Headers, bytes]]:
    """Give the headers and the data of each part of a multipart body."""
    if not boundary or not boundary.isascii():
        raise _not_a_form("the header Content-Type names no boundary")
    # What is no part's data stays in the decoder, and takes thirty times its size as headers.
    decoder = multipart.MultipartDecoder(boundary.encode(), max_form_memory_size=2 * _CHUNK_BYTES)
    headers, chunks = Headers(), list[bytes]()
    try:
        for event in _events(decoder, body):
            if isinstance(event, (multipart.Field, multipart.File)):
                headers, chunks = event.headers, []
            elif isinstance(event, multipart.Data):
                chunks.append(event.data)
                if not event.more_data:
                    yield headers, b"".join(chunks)
    except ValueError:
        raise _not_a_form("a part is malformed, or the last boundary is missing") from None
    except RequestEntityTooLarge:
        raise _not_a_form("a part's headers, or what is before and after all parts, are too large") from None


def _not_a_form(reason: str) -> InvalidInput:
    return InvalidInput(f"the body is not a valid multipart form: {reason}")


def _events(decoder: multipart.MultipartDecoder, body: bytes) -> Iterator[multipart.Event]:
    # In chunks, since the decoder moves what it has not read yet with every part.
    for start in range(0, len(body) + 1, _CHUNK_BYTES):
        decoder.receive_data(body[start : start + _CHUNK_BYTES])
        while not isinstance(event := decoder.next_event(), multipart.NeedData):
            yield event
    decoder.receive_data(None)
    yield decoder.next_event()


def _named_part(headers: Headers, data: bytes) -> tuple[str, Part]:
    _, options = parse_options_header(headers.get("Content-Disposition"))
    content_type = parse_options_header(headers.get("Content-Type"))[0].lower()
    if "name" not in options:
        raise _not_a_form("a part has no name")
    if "filename" in options:
        kind = "file"
    elif content_type == "application/json":
        kind = "json"
    else:
        kind = "text" if not content_type or content_type.startswith("text/") else "file"
    return options["name"], Part(data, kind)


# JSON


def _parse_json(data: bytes, what: str, field: str | None = None) -> Any:
    """Parse what must be JSON as the standard has it, without what recursive code or a number could fail on later."""

    def invalid(reason: str) -> InvalidInput:
        return InvalidInput(f"{what} is {reason}", field=field)

    if len(data) > MAX_JSON_VALUES and sum(map(data.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise TooLarge(
            f"{what} has more than {MAX_JSON_VALUES} commas and opening brackets, the most that JSON may have here",
            field=field,
        )
    with suppress(ValueError, RecursionError):
        value = from_json(data, allow_inf_nan=False)
        if all(map(_is_usual, _elements(value))):
            return value
    # That was twenty times as fast. What it took too much of, or did not take, is taken or refused here.
    try:
        text = data.decode("utf-8-sig")
        if not text.strip():
            raise invalid("empty: it must be JSON")
        value = _decoder.decode(text)
        deque(_elements(value), maxlen=0)
    except RecursionError:
        raise invalid(_TOO_DEEP) from None
    except UnicodeDecodeError as error:
        raise invalid(f"not valid JSON: byte {error.start} is not UTF-8") from None
    except ValueError as error:  # malformed, NaN, or a number too large
        raise invalid(f"not valid JSON: {error}") from None
    return value


def _elements(value: Any) -> Iterator[Any]:
    """Give a value and all that it holds.

    Raises:
        RecursionError: it is nested so deeply that recursive code (a JSON encoder, a model's) could fail on it later.
    """
    containers: list[Any] = [[value]]
    for _ in range(MAX_NESTING + 1):
        elements = [element for held in containers for element in (held.values() if isinstance(held, dict) else held)]
        yield from elements
        containers = [element for element in elements if isinstance(element, (dict, list))]
        if not containers:
            return
    raise RecursionError


def _is_usual(value: Any) -> bool:
    """Tell whether a value is no number, or so small a one that it is certainly allowed."""
    return not isinstance(value, (int, float)) or abs(value) < 10.0**MAX_DIGITS


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _bounded_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"the number {text[:40]}... is too large")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


_decoder: Final = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite_float, parse_int=_bounded_int)
