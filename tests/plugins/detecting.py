"""Comparing detections with what a library gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image


def best_first(
    boxes: torch.Tensor, labels: list[str], scores: torch.Tensor, picture: Image.Image
) -> dict[str, list[Any]]:
    """Return detections as an answer holds them: the best first, with their boxes inside the picture."""
    order = scores.argsort(descending=True, stable=True).tolist()
    limits = torch.tensor(picture.size * 2)
    return {
        "boxes": [boxes[index].clamp(min=torch.zeros(4)).minimum(limits).tolist() for index in order],
        "labels": [labels[index] for index in order],
        "scores": [scores[index].item() for index in order],
    }


def assert_same_detections(answer: dict[str, list[Any]], expected: dict[str, list[Any]]) -> None:
    assert answer["labels"] == expected["labels"]
    assert answer["scores"] == pytest.approx(expected["scores"], abs=1e-4)
    for box, expected_box in zip(answer["boxes"], expected["boxes"], strict=True):
        assert box == pytest.approx(expected_box, abs=1e-2)
