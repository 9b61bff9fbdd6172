from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
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


@pytest.fixture(scope="module")
def features() -> Callable[..., Any]:
    """``features(picture or text)`` gives the projected features that transformers alone gives."""
    from transformers import CLIPModel, CLIPProcessor

    model: Any = CLIPModel.from_pretrained(checkpoint("clip_vit_large_patch14"))
    processor: Any = CLIPProcessor.from_pretrained(checkpoint("clip_vit_large_patch14"))

    def embed(of: Image.Image | str) -> Any:
        with torch.inference_mode():
            if isinstance(of, str):
                tokens = processor(text=[of], truncation=True, return_tensors="pt")
                return model.get_text_features(**tokens).pooler_output[0].numpy()
            pixels = processor(images=of.convert("RGB"), return_tensors="pt")
            return model.get_image_features(**pixels).pooler_output[0].numpy()

    return embed


TEXTS = ["a cat", "", "two dogs in the snow", "one two three " * 1000]


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES.keys())
def test_image_s_vector_is_that_of_transformers_normalised(
    ask: Ask, features: Callable[..., Any], picture: Image.Image
) -> None:
    answer = ask("image_embedding", image=picture)

    expected = features(picture)
    assert answer == pytest.approx(expected / np.linalg.norm(expected), abs=1e-5)


@pytest.mark.parametrize("task", ["text_embedding", "text_query_embedding"])
@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:9])
def test_text_s_vector_is_that_of_transformers_normalised(
    ask: Ask, features: Callable[..., Any], text: str, task: str
) -> None:
    answer = ask(task, text=text)

    expected = features(text)
    assert answer == pytest.approx(expected / np.linalg.norm(expected), abs=1e-5)


def test_vectors_are_as_long_as_the_model_makes_them_if_they_are_not_to_be_normalised(
    ask: Ask, features: Callable[..., Any]
) -> None:
    image = ask("image_embedding", image=draw(0), config={"normalize": False})
    text = ask("text_embedding", text="a cat", config={"normalize": False})

    assert image == pytest.approx(features(draw(0)), abs=1e-4)
    assert text == pytest.approx(features("a cat"), abs=1e-4)
    assert not 0.9 < np.linalg.norm(text) < 1.1


@pytest.mark.parametrize(
    ("task", "key", "items"),
    [("image_embedding", "image", list(PICTURES.values())), ("text_embedding", "text", TEXTS)],
    ids=["images", "texts"],
)
def test_vectors_of_a_batch_are_those_of_its_items_alone(ask: Ask, task: str, key: str, items: list[Any]) -> None:
    answers = ask(task, **{key: items})

    for item, answer in zip(items, answers, strict=True):
        assert answer == pytest.approx(ask(task, **{key: item}), abs=1e-5)


def test_images_and_texts_are_compared_by_their_vectors(ask: Ask) -> None:
    image = np.array(ask("image_embedding", image=draw(0)))
    texts = np.array(ask("text_embedding", text=CLASSES))
    probabilities = ask(TASK, image=draw(0), classes=CLASSES)

    assert (texts @ image).argsort().tolist() == np.array(probabilities).argsort().tolist()


def test_tokens_that_were_read_of_a_text_are_counted_on_demand(ask: Ask) -> None:
    answers = ask("text_embedding", text=["", "one two three " * 1000], config={"count_tokens": True})

    assert [answer["tokens"] for answer in answers] == [2, 77]
    assert answers[0]["embedding"] == pytest.approx(ask("text_embedding", text=""), abs=1e-5)
