"""JSON of answers: what the standard library gives, whichever library writes it."""

import json
import random
import struct
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from enum import StrEnum
from typing import Any

import pytest

from feature_extraction_server.core.to_json import to_json


class Colour(StrEnum):
    RED = "red"


@dataclass
class Named:
    name: str = "a"


def random_numbers(n: int) -> list[float]:
    drawn = random.Random(0)
    numbers = [struct.unpack("d", drawn.randbytes(8))[0] for _ in range(n)]
    return [number for number in numbers if abs(number) < float("inf")]


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(random_numbers(2000), id="numbers"),
        pytest.param([0.0, -0.0, 5e-324, 1e16, 1e22, 1e-7, True, False, None], id="scalars"),
        pytest.param([2**53, 2**63, 2**64 - 1, 2**64, -(2**80)], id="large integers"),
        pytest.param('äö \u2028 \U0001f600 \x00\x1f\x7f"\\/', id="text"),
        pytest.param({"a": {"b": [(1, 2), []]}, "": {}}, id="nested"),
        pytest.param({1: 2, None: 3, 1.5: 4, False: 5}, id="keys that are no texts"),
        pytest.param([Colour.RED, "null"], id="texts of other types"),
        pytest.param(nested(300), id="depth"),
    ],
)
def test_like_the_standard_library(value: Any) -> None:
    assert json.loads(to_json(value)) == json.loads(json.dumps(value))


def test_as_short_as_can_be() -> None:
    assert to_json({"a": [1, "ä"], "b": None}) == '{"a":[1,"ä"],"b":null}'.encode()
    assert to_json({"a": [1, "ä"]}) == '{"a":[1,"ä"]}'.encode()


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        [1.0, float("inf")],
        {"a": [None, -float("inf")]},
        {1: float("nan")},
        "\ud800",
        b"bytes",
        {1, 2},
        Named(),
        date(2000, 1, 1),
        Decimal(1),
        {(1, 2): 3},
        {"a": object()},
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_json_cannot_express_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        to_json([value])


@pytest.mark.parametrize("rest", [[], [None], [2**70]], ids=["by one library", "by the other", "by both"])
def test_default_stands_for_what_json_has_no_form_for(rest: list[Any]) -> None:
    value = [Named("b"), date(2000, 1, 1), Decimal("1.5"), *rest]

    assert json.loads(to_json(value, str)) == ["Named(name='b')", "2000-01-01", "1.5", *rest]
