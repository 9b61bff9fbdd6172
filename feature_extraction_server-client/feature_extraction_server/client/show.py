"""Answers as people want to read them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def show(result: Any, classes: Sequence[str] | None = None) -> str:
    """Return one result as text, by its shape.

    Args:
        classes: what the numbers of a list stand for.
    """
    if isinstance(result, str):
        return printable(result)
    if _is_list_of(result, str):
        return "\n".join(map(printable, result))
    if _is_list_of(result, int | float):
        if classes is not None and len(classes) == len(result):
            return _probabilities(result, classes)
        return _vector(result)
    if isinstance(result, Mapping) and {"boxes", "labels", "scores"} <= result.keys():
        return _detections(result)
    if isinstance(result, Mapping) and {"labels", "scores"} <= result.keys():
        return _probabilities(result["scores"], result["labels"])
    if isinstance(result, Mapping) and {"text", "segments"} <= result.keys():
        return _times(result.get("words", result["segments"]), "text")
    if _is_list_of(result, Mapping):
        if all({"start", "end", "speaker"} <= one.keys() for one in result):
            return _times(result, "speaker")
        if all({"box", "score", "embedding"} <= one.keys() for one in result):
            return _faces(result)
        if all({"box", "text"} <= one.keys() for one in result):
            return table([[_box(one["box"]), printable(one["text"])] for one in result])
    return printable(json.dumps(result, ensure_ascii=False, indent=2))


def show_meta(meta: Mapping[str, Any]) -> str:
    """Return as one line of text where a result comes from."""
    told = [meta[key] for key in ("model", "checkpoint", "revision", "dtype", "device") if meta.get(key) is not None]
    return printable(f"({', '.join(map(str, told))})")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text, in columns of one width."""
    if not rows:
        return ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def printable(text: str) -> str:
    """Return a text without the characters that a terminal would act on."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def _is_list_of(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kind) for item in value)


def _probabilities(numbers: Sequence[float], classes: Sequence[str]) -> str:
    best_first = sorted(zip(numbers, classes, strict=True), key=lambda pair: -pair[0])
    return table([[f"{number:6.1%}", printable(name)] for number, name in best_first])


def _vector(numbers: Sequence[float]) -> str:
    length = math.sqrt(sum(number * number for number in numbers))
    first = ", ".join(f"{number:.4g}" for number in numbers[:4])
    more = ", ..." if len(numbers) > 4 else ""
    return f"{len(numbers)} numbers of length {length:.4g}: [{first}{more}]"


def _detections(result: Mapping[str, Any]) -> str:
    rows = [
        [f"{score:6.1%}", printable(label), _box(box)]
        for box, label, score in zip(result["boxes"], result["labels"], result["scores"], strict=True)
    ]
    return table(rows) or "nothing found"


def _box(box: Sequence[float]) -> str:
    return " ".join(f"{edge:.0f}" for edge in box)


def _faces(faces: Sequence[Mapping[str, Any]]) -> str:
    return table([[_box(face["box"]), f"{face['score']:.3g}", _vector(face["embedding"])] for face in faces])


def _times(timed: Sequence[Mapping[str, Any]], what: str) -> str:
    rows = [[f"{one['start']:8.2f} {one['end']:8.2f}", printable(one[what]).strip()] for one in timed]
    return table(rows) or "nothing is said"
