from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from feature_extraction_server.core.ocr import Line, answer, in_reading_order

PICTURE = Image.new("RGB", (100, 50))


def line(text: str, *box: float, confidence: float = 1) -> Line:
    return Line(text=text, box=list(box), confidence=confidence)


def texts(lines: list[Line]) -> list[str]:
    return [one["text"] for one in lines]


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param([line("a", 0, 0, 50, 10), line("b", 0, 12, 50, 22)], id="below each other"),
        pytest.param([line("a", 0, 2, 40, 12), line("b", 50, 0, 90, 10), line("c", 0, 15, 40, 25)], id="uneven row"),
        pytest.param([line("a", 0, 0, 40, 10), line("b", 44, 0, 60, 40), line("c", 0, 50, 40, 60)], id="large beside"),
        pytest.param([line("a", 0, 0, 600, 80), line("b", 0, 38, 600, 118)], id="slanted, boxes overlap"),
        pytest.param([line("a", 5, 0, 40, 20), line("b", 0, 9, 40, 29)], id="overlapping, the second further left"),
        pytest.param([], id="none"),
    ],
)
def test_lines_are_read_row_by_row_and_each_row_from_the_left(lines: list[Line]) -> None:
    assert texts(in_reading_order(lines)) == texts(lines)
    assert texts(in_reading_order(lines[::-1])) == texts(lines)


def test_answer_is_the_lines_joined() -> None:
    lines = [line(" one ", 0, 0, 9, 9), line("  ", 0, 10, 9, 19), line("two", 0, 20, 9, 29)]

    assert answer(lines, PICTURE, {}) == "one\ntwo"


def test_detail_is_the_lines_with_boxes_inside_the_image() -> None:
    found = answer([line("one", -3.5, 2, 120, 60, confidence=0.7)], PICTURE, {"detail": True})

    assert found == [{"text": "one", "box": [0, 2, 100, 50], "confidence": 0.7}]


@pytest.mark.parametrize(
    ("config", "expected"),
    [({}, "sure\nhalf"), ({"min_confidence": 0.9}, "sure"), ({"min_confidence": 0}, "sure\nhalf\nunsure")],
    ids=["by default below half", "as the request says", "none"],
)
def test_lines_that_the_model_is_not_sure_of_are_left_out(config: dict[str, Any], expected: str) -> None:
    lines = [line(text, 0, 0, 9, 9, confidence=c) for text, c in (("sure", 0.95), ("half", 0.5), ("unsure", 0.2))]

    assert answer(lines, PICTURE, config) == expected


@pytest.mark.parametrize(("config", "expected"), [({}, ""), ({"detail": True}, [])], ids=["text", "detail"])
def test_answer_without_a_line_is_empty(config: dict[str, Any], expected: Any) -> None:
    assert answer([], PICTURE, config) == expected
