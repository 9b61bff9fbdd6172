"""Tests of what a model remembers of classes."""

from __future__ import annotations

from typing import Any

import pytest

from feature_extraction_server.core.class_vectors import ClassVectors

torch = pytest.importorskip("torch")


class Lengths:
    """Embeds a text as its length, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, texts: list[str]) -> Any:
        self.asked.append(texts)
        return torch.tensor([[float(len(text))] for text in texts])


def test_a_class_is_embedded_the_first_time_that_it_is_named_and_no_more() -> None:
    embed = Lengths()
    vectors = ClassVectors(embed)

    answers = [vectors(classes).flatten().tolist() for classes in (["a", "bbb"], ["bbb", "cc", "a"], ["cc"])]

    assert answers == [[1, 3], [3, 2, 1], [2]]
    assert embed.asked == [["a", "bbb"], ["cc"]]


def test_a_class_that_is_named_twice_has_two_equal_vectors() -> None:
    embed = Lengths()

    assert ClassVectors(embed)(["bb", "a", "bb"]).flatten().tolist() == [2, 1, 2]
    assert embed.asked == [["bb", "a"]]


def test_the_classes_named_last_are_kept() -> None:
    embed = Lengths()
    vectors = ClassVectors(embed, max_kept=2)

    for classes in (["a"], ["bb"], ["a"], ["ccc"], ["a"], ["bb"]):
        vectors(classes)

    assert embed.asked == [["a"], ["bb"], ["ccc"], ["bb"]]


def test_more_classes_than_are_kept_are_all_answered() -> None:
    embed = Lengths()

    assert ClassVectors(embed, max_kept=2)(["a", "bb", "ccc"]).flatten().tolist() == [1, 2, 3]
