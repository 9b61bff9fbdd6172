"""Pictures and recordings as they are sent: as base64 in JSON, or as files in a form."""

from __future__ import annotations

import base64
import io
import json
import mimetypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from urllib3.filepost import encode_multipart_formdata


class Picture(Protocol):
    """What the client needs of a ``PIL.Image.Image``, so that Pillow need not be there."""

    @property
    def mode(self) -> str: ...

    def save(self, fp: Any, format: str | None = None) -> None: ...

    def convert(self, mode: str) -> Any: ...


#: A file's path, its content, an open binary file, or a picture of Pillow's.
Media = os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Picture

# What Python's own table lacks.
_MORE_TYPES = {
    ".avif": "image/avif",
    ".webp": "image/webp",
    ".flac": "audio/flac",
    ".m4a": "audio/mp4",
    ".oga": "audio/ogg",
    ".ogg": "audio/ogg",
    ".opus": "audio/ogg",
}
_PNG_MODES = {"1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"}


@dataclass(frozen=True)
class File:
    """A file to send."""

    content: bytes
    name: str = "file"


def content_type_of(name: str) -> str:
    """Return the content type that a file's name tells."""
    suffix = Path(name).suffix.lower()
    return _MORE_TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"


def as_media(value: Media | str) -> Media | str:
    """Return where a medium comes from: a string names a file, unless it is a URL."""
    if isinstance(value, str) and not value.startswith(("http://", "https://", "data:")):
        return Path(value)
    return value


def read_files(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's input with every medium in it read, lists of media included.

    Raises:
        OSError: a file cannot be read.
    """
    return {
        key: [_read(item) for item in value] if isinstance(value, list) else _read(value)
        for key, value in inputs.items()
    }


def has_files(inputs: Mapping[str, Any]) -> bool:
    """Tell whether there is a file in an input that ``read_files`` gave."""
    return any(
        isinstance(item, File) for value in inputs.values() for item in (value if isinstance(value, list) else [value])
    )


def json_body(inputs: Mapping[str, Any]) -> tuple[bytes, str]:
    """Return an input as a JSON body, files in base64, and its content type.

    Raises:
        TypeError: a value is neither JSON nor a medium.
    """
    return json.dumps(inputs, default=_base64).encode(), "application/json"


def form_body(inputs: Mapping[str, Any]) -> tuple[bytes, str]:
    """Return an input as a multipart form, files as they are, and its content type.

    Raises:
        TypeError: a value is neither JSON nor a medium.
    """
    parts: list[tuple[str, Any]] = []
    for key, value in inputs.items():
        if isinstance(value, list) and any(isinstance(item, File) for item in value):
            parts += [(f"{key}[]", _part(item)) for item in value]  # a list, even of one
        else:
            parts.append((key, _part(value)))
    return encode_multipart_formdata(parts)


def _part(value: Any) -> Any:
    if isinstance(value, File):
        return value.name, value.content, content_type_of(value.name)
    return value if isinstance(value, str) else (None, json.dumps(value), "application/json")


def _read(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return File(bytes(value))
    if isinstance(value, os.PathLike):
        path = Path(value)
        return File(path.read_bytes(), path.name.encode("utf-8", "replace").decode())
    if hasattr(value, "read"):
        return File(value.read())
    if hasattr(value, "save") and hasattr(value, "mode"):
        return _png(value)
    return value


def _png(picture: Picture) -> File:
    file = io.BytesIO()
    (picture if picture.mode in _PNG_MODES else picture.convert("RGB")).save(file, format="PNG")
    return File(file.getvalue(), "picture.png")


def _base64(value: Any) -> str:
    if isinstance(value, File):
        return base64.b64encode(value.content).decode()
    raise TypeError(f"{type(value).__name__} is neither JSON nor a medium")
