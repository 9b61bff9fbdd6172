"""A task with a hand-written ``wrap``: the text in capitals, after the model has seen it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def wrap(func: Callable[..., Any]) -> Callable[..., str]:
    def shout(text: str, mark: str = "!") -> str:
        if not isinstance(text, str):
            raise ValueError("text must be a string")
        if not isinstance(mark, str):
            raise ValueError("mark must be a string")
        return str(func(text)).upper() + mark

    return shout
