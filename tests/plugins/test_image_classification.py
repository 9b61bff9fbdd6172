from __future__ import annotations

from typing import Any

import pytest

from feature_extraction_server.core.errors import InvalidInput, ModelError
from feature_extraction_server.tasks.image_classification import wrap
from tests.conftest import encode_image
from tests.plugins.asking import draw


def classify(answer: dict[str, list[Any]], config: dict[str, Any]) -> Any:
    """Return what the task makes of a model's answer."""
    return wrap(lambda image, config: [answer])(image=encode_image(draw(0)), config=config)


def test_classes_are_put_best_first_and_no_more_of_them_than_five() -> None:
    answer: dict[str, list[Any]] = {"labels": list("abcdef"), "scores": [0.1, 0.3, 0.25, 0.05, 0.2, 0.1]}

    assert classify(answer, {}) == {"labels": list("bceaf"), "scores": [0.3, 0.25, 0.2, 0.1, 0.1]}


def test_top_k_holds_for_a_model_that_gives_more() -> None:
    answer: dict[str, list[Any]] = {"labels": ["a", "b"], "scores": [0.2, 0.8]}

    assert classify(answer, {"top_k": 1}) == {"labels": ["b"], "scores": [0.8]}


def test_top_k_out_of_bounds_is_refused_though_the_model_declares_no_config() -> None:
    with pytest.raises(InvalidInput, match=r"config\.top_k"):
        classify({"labels": ["a"], "scores": [1.0]}, {"top_k": "many"})


def test_labels_without_scores_are_the_model_s_error() -> None:
    with pytest.raises(ModelError, match="not equally many"):
        classify({"labels": ["a", "b"], "scores": [1.0]}, {})
