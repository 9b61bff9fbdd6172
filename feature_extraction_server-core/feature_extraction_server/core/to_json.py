"""Answers as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import orjson

#: What the standard library's encoder does not know either.
_LEFT_TO_DEFAULT: Final = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME


def to_json(value: Any, default: Callable[[Any], Any] | None = None) -> bytes:
    """Return a value as compact JSON in UTF-8, with no NaN and no infinity.

    Args:
        default: returns what stands for an object that JSON has no form for, or raises TypeError.

    Raises:
        TypeError, ValueError: JSON cannot express it.
    """
    try:
        data = orjson.dumps(value, default, _LEFT_TO_DEFAULT)
        if b"null" not in data:  # which it writes in the place of NaN and infinity, too
            return data
    except TypeError:  # it knows no keys but texts, and no integers of more than 64 bits
        pass
    # A vector's 384 numbers take the standard library ten times as long or more.
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=default).encode()
