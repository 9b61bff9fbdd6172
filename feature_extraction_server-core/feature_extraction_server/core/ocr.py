"""Text in images, alike for every model that reads it: what a client may ask, the order of lines, the answer's form."""

from __future__ import annotations

from typing import Annotated, Any, Final

from PIL.Image import Image
from pydantic import Field
from typing_extensions import TypedDict

from feature_extraction_server.core.config import Config
from feature_extraction_server.core.task import FiniteFloat, Probability

MIN_CONFIDENCE: Final = 0.5
#: How much of the narrower of two lines must lie above or below the other one for them to be two rows.
_MAX_SHARED_WIDTH: Final = 0.3


class OcrConfig(Config):
    """What a client may ask of a model that reads text."""

    detail: bool = False
    min_confidence: float = Field(MIN_CONFIDENCE, ge=0, le=1)


class Line(TypedDict):
    """A line of text; ``box`` is [xmin, ymin, xmax, ymax] in pixels of the image."""

    text: str
    box: Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)]
    confidence: Probability


#: What the task answers for one image: its lines as one string, unless ``config.detail`` is true.
ReadText = str | list[Line]


def answer(lines: list[Line], image: Image, config: dict[str, Any]) -> ReadText:
    """Return what the task answers for an image in which a model has read ``lines``, in the order that they have.

    Args:
        lines: what the model read; boxes may reach over the image's edge.
        image: where it was read.
        config: the request's, as ``OcrConfig`` checked it.
    """
    least = config.get("min_confidence", MIN_CONFIDENCE)
    kept = [
        Line(text=text, box=_inside(line["box"], image.size), confidence=line["confidence"])
        for line in lines
        if line["confidence"] >= least and (text := line["text"].strip())
    ]
    return kept if config.get("detail", False) else "\n".join(line["text"] for line in kept)


def in_reading_order(lines: list[Line]) -> list[Line]:
    """Return lines row by row from the top, each row from the left.

    A line continues a row if it is beside the row's lines, its middle between the top and the bottom of the first one.
    Of lines of slanted text, whose boxes overlap, each is a row of its own.
    """
    rows: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: (_middle(line["box"]), line["box"][0])):
        row = rows[-1] if rows else []
        if row and _middle(line["box"]) < row[0]["box"][3] and all(_beside(line["box"], one["box"]) for one in row):
            row.append(line)
        else:
            rows.append([line])
    return [line for row in rows for line in sorted(row, key=lambda line: line["box"][0])]


def _middle(box: list[float]) -> float:
    return (box[1] + box[3]) / 2


def _beside(first: list[float], second: list[float]) -> bool:
    shared = min(first[2], second[2]) - max(first[0], second[0])
    return shared <= _MAX_SHARED_WIDTH * min(first[2] - first[0], second[2] - second[0])


def _inside(box: list[float], size: tuple[int, int]) -> list[float]:
    return [min(max(float(value), 0.0), float(limit)) for value, limit in zip(box, size * 2, strict=True)]
