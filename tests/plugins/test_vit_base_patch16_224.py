from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from tests.checkpoints import checkpoint
from tests.plugins.asking import PICTURES, Ask, draw

TASK = "image_classification"


@pytest.fixture
def ask(asks: Callable[[str], Ask]) -> Ask:
    return asks("vit_base_patch16_224")


@pytest.fixture(scope="module")
def direct() -> Callable[..., list[tuple[str, float]]]:
    """``direct(picture, top_k)`` gives the classes and probabilities that transformers alone gives, best first."""
    from transformers import ViTForImageClassification, ViTImageProcessorPil

    model: Any = ViTForImageClassification.from_pretrained(checkpoint("vit_base_patch16_224"))
    processor: Any = ViTImageProcessorPil.from_pretrained(checkpoint("vit_base_patch16_224"))

    def classify(picture: Image.Image, top_k: int = 5) -> list[tuple[str, float]]:
        with torch.inference_mode():
            (logits,) = model(**processor(picture.convert("RGB"), return_tensors="pt")).logits
        each = {model.config.id2label[index]: value for index, value in enumerate(logits.softmax(dim=0).tolist())}
        return sorted(each.items(), key=lambda one: one[1], reverse=True)[:top_k]

    return classify


def assert_same(answer: dict[str, list[Any]], expected: list[tuple[str, float]]) -> None:
    assert answer["labels"] == [label for label, _ in expected]
    assert answer["scores"] == pytest.approx([score for _, score in expected], abs=1e-5)


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES.keys())
def test_classes_are_those_that_transformers_gives(
    ask: Ask, direct: Callable[..., list[tuple[str, float]]], picture: Image.Image
) -> None:
    assert_same(ask(TASK, image=picture), direct(picture))


def test_classes_of_a_batch_are_those_of_its_images_alone(
    ask: Ask, direct: Callable[..., list[tuple[str, float]]]
) -> None:
    answers = ask(TASK, image=list(PICTURES.values()))

    for picture, answer in zip(PICTURES.values(), answers, strict=True):
        assert_same(answer, direct(picture))


@pytest.mark.parametrize(("top_k", "n_classes"), [(1, 1), (3, 3), (1000, 7)], ids=["one", "three", "more than are"])
def test_top_k_tells_how_many_classes_there_are(
    ask: Ask, direct: Callable[..., list[tuple[str, float]]], top_k: int, n_classes: int
) -> None:
    answer = ask(TASK, image=draw(0), config={"top_k": top_k})

    assert len(answer["labels"]) == n_classes
    assert_same(answer, direct(draw(0), top_k))


@pytest.mark.parametrize("top_k", [0, -1, 2.0, "3", True], ids=str)
def test_top_k_that_is_no_number_of_classes_is_refused(ask: Ask, top_k: object) -> None:
    response = ask.response(TASK, image=draw(0), config={"top_k": top_k})

    assert response.status_code == 400
    assert response.json["field"] == "config.top_k"
