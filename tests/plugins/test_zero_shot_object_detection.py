from __future__ import annotations

from typing import Any

import pytest

from feature_extraction_server.core.errors import ModelError
from feature_extraction_server.tasks.zero_shot_object_detection import wrap
from tests.conftest import encode_image
from tests.plugins.asking import draw

FOUND: dict[str, list[Any]] = {"boxes": [[0, 0, 1, 1]], "labels": ["cat"], "scores": [0.5]}


def detect(answer: dict[str, list[Any]], classes: list[str]) -> Any:
    """Return what the task makes of a model's answer."""
    return wrap(lambda image, classes, config: [answer])(image=encode_image(draw(0)), classes=classes)


def test_answer_is_that_of_object_detection() -> None:
    assert detect(FOUND, ["dog", "cat"]) == FOUND


def test_label_that_is_none_of_the_classes_is_the_model_s_error() -> None:
    with pytest.raises(ModelError, match="'cat' is none of the classes"):
        detect(FOUND, ["dog"])


def test_object_without_a_box_is_the_model_s_error() -> None:
    with pytest.raises(ModelError, match="not equally many"):
        detect(FOUND | {"boxes": []}, ["cat"])
