from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from tests.checkpoints import checkpoint
from tests.plugins.asking import PICTURES, Ask, draw

TASK = "zero_shot_image_classification"
CLASSES = ["a cat", "two dogs", "a red square", ""]


@pytest.fixture
def ask(asks: Callable[[str], Ask]) -> Ask:
    return asks("clip_vit_large_patch14")


@pytest.fixture(scope="module")
def direct() -> Callable[..., list[float]]:
    """``direct(picture, classes)`` gives the probabilities that transformers alone gives."""
    from transformers import CLIPModel, CLIPProcessor

    model: Any = CLIPModel.from_pretrained(checkpoint("clip_vit_large_patch14"))
    processor: Any = CLIPProcessor.from_pretrained(checkpoint("clip_vit_large_patch14"))

    def classify(picture: Image.Image, classes: list[str]) -> list[float]:
        inputs = processor(
            images=picture.convert("RGB"), text=classes, padding=True, truncation=True, return_tensors="pt"
        )
        with torch.inference_mode():
            probabilities: list[float] = model(**inputs).logits_per_image.softmax(dim=1)[0].tolist()
        return probabilities

    return classify


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES.keys())
def test_probabilities_are_those_that_transformers_gives(
    ask: Ask, direct: Callable[..., list[float]], picture: Image.Image
) -> None:
    answer = ask(TASK, image=picture, classes=CLASSES)

    assert answer == pytest.approx(direct(picture, CLASSES), abs=1e-5)


def test_probabilities_of_a_batch_are_those_of_its_images_alone(ask: Ask) -> None:
    pictures = list(PICTURES.values())

    answers = ask(TASK, image=pictures, classes=CLASSES)

    for picture, answer in zip(pictures, answers, strict=True):
        assert answer == pytest.approx(ask(TASK, image=picture, classes=CLASSES), abs=1e-5)


def test_hundreds_of_classes_with_doubles_sum_up_to_one(ask: Ask, direct: Callable[..., list[float]]) -> None:
    classes = [f"number {n % 250}" for n in range(500)]

    answer = ask(TASK, image=draw(0), classes=classes)

    assert sum(answer) == pytest.approx(1)
    assert answer == pytest.approx(direct(draw(0), classes), abs=1e-5)
    assert answer[:250] == pytest.approx(answer[250:], abs=1e-6)


def test_long_names_are_cut_off_where_the_model_s_positions_end(ask: Ask, direct: Callable[..., list[float]]) -> None:
    classes = ["one two three " * 1000, "a cat"]

    answer = ask(TASK, image=draw(0), classes=classes)

    assert answer == pytest.approx(direct(draw(0), classes), abs=1e-5)


def test_template_stands_around_every_name(ask: Ask, direct: Callable[..., list[float]]) -> None:
    answer = ask(TASK, image=draw(0), classes=["cat", "{}"], config={"template": "a photo of a {}."})

    assert answer == pytest.approx(direct(draw(0), ["a photo of a cat.", "a photo of a {}."]), abs=1e-5)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 5_000)], ids=["column", "row", "strip"])
def test_strip_of_a_picture_is_classified_by_its_middle(
    ask: Ask, direct: Callable[..., list[float]], size: tuple[int, int]
) -> None:
    picture = draw(1, size)
    width, height = size
    middle = [width // 2 - 3, height // 2 - 3, width // 2 + 3, height // 2 + 3]
    short = picture.crop((max(0, middle[0]), max(0, middle[1]), min(width, middle[2]), min(height, middle[3])))

    answer = ask(TASK, image=picture, classes=CLASSES)

    assert answer == pytest.approx(direct(short, CLASSES), abs=1e-3)


def test_strip_of_a_picture_is_cut_before_it_is_enlarged(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    import feature_extraction_server.models.clip_vit_large_patch14 as plugin

    ask(TASK, image=draw(0), classes=CLASSES)
    image_processor = plugin.image_processor
    sizes: list[tuple[int, int]] = []

    def process(images: list[Image.Image], **arguments: Any) -> Any:
        sizes.extend(image.size for image in images)
        return image_processor(images, **arguments)

    monkeypatch.setattr(plugin, "image_processor", process)

    ask(TASK, image=[draw(0, (2, 9_000)), draw(0, (9_000, 1)), draw(0, (80, 10))], classes=CLASSES)

    assert sizes == [(2, 16), (8, 1), (80, 10)]


def test_template_without_a_place_for_the_name_is_refused(ask: Ask) -> None:
    response = ask.response(TASK, image=draw(0), classes=CLASSES, config={"template": "a photo"})

    assert response.status_code == 400
    assert response.json["field"] == "config.template"
