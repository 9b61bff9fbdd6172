"""CLIP, OpenCLIP and SigLIP 2: what they embed and how they classify is what transformers alone gives."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.checkpoints import checkpoint, transformers
from tests.plugins.asking import PICTURES, Ask, draw

TASK = "zero_shot_image_classification"
CLASSES = ["a cat", "two dogs", "a red square", ""]
TEXTS = ["a cat", "", "two dogs in the snow", "one two three " * 1000]
CLIP = ("CLIPModel", "CLIPImageProcessorPil", {"padding": True})
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "clip_vit_large_patch14": CLIP,
    "open_clip_vit_b32": CLIP,
    "siglip2_base_patch16_224": ("SiglipModel", "SiglipImageProcessorPil", {"padding": "max_length", "max_length": 64}),
}


class Direct:
    """A model as transformers alone runs it, by the recipe on its model card."""

    def __init__(self, model: str) -> None:
        model_class, image_processor_class, self._arguments = MODELS[model]
        folder = checkpoint(model)
        self._model = getattr(transformers(), model_class).from_pretrained(folder)
        self._image_processor = getattr(transformers(), image_processor_class).from_pretrained(folder)
        self._tokenizer = transformers().AutoTokenizer.from_pretrained(folder)
        self._lowers = model.startswith("siglip")

    def _tokens(self, texts: list[str]) -> Any:
        texts = [text.lower() for text in texts] if self._lowers else texts
        return self._tokenizer(texts, truncation=True, return_tensors="pt", **self._arguments)

    def _pixels(self, picture: Image.Image) -> Any:
        return self._image_processor(picture.convert("RGB"), return_tensors="pt")

    @torch.inference_mode()
    def embed(self, of: Image.Image | str) -> Any:
        """Return the vector of a picture or a text as the model makes it."""
        if isinstance(of, str):
            return self._model.get_text_features(**self._tokens([of])).pooler_output[0].numpy()
        return self._model.get_image_features(**self._pixels(of)).pooler_output[0].numpy()

    @torch.inference_mode()
    def classify(self, picture: Image.Image, classes: list[str]) -> Any:
        """Return the classes' probabilities."""
        logits = self._model(**self._tokens(classes), **self._pixels(picture)).logits_per_image[0]
        return (logits.sigmoid() if self._lowers else logits.softmax(dim=0)).tolist()


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def direct(model: str) -> Direct:
    return Direct(model)


@pytest.fixture
def ask(asks: Callable[[str], Ask], model: str) -> Ask:
    return asks(model)


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES.keys())
def test_probabilities_are_those_that_transformers_gives(ask: Ask, direct: Direct, picture: Image.Image) -> None:
    answer = ask(TASK, image=picture, classes=CLASSES)

    assert answer == pytest.approx(direct.classify(picture, CLASSES), abs=1e-5)


def test_probabilities_of_a_batch_are_those_of_its_images_alone(ask: Ask) -> None:
    pictures = list(PICTURES.values())

    answers = ask(TASK, image=pictures, classes=CLASSES)

    for picture, answer in zip(pictures, answers, strict=True):
        assert answer == pytest.approx(ask(TASK, image=picture, classes=CLASSES), abs=1e-5)


def test_hundreds_of_classes_with_long_names_and_doubles_have_their_probabilities(ask: Ask, direct: Direct) -> None:
    classes = ["one two three " * 1000, *(f"number {n % 150}" for n in range(300))]

    answer = ask(TASK, image=draw(0), classes=classes)

    assert answer == pytest.approx(direct.classify(draw(0), classes), abs=1e-5)


def test_template_stands_around_every_name(ask: Ask, direct: Direct) -> None:
    answer = ask(TASK, image=draw(0), classes=["cat", "{}"], config={"template": "a Photo of a {}."})

    assert answer == pytest.approx(direct.classify(draw(0), ["a Photo of a cat.", "a Photo of a {}."]), abs=1e-5)


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES.keys())
def test_image_s_vector_is_that_of_transformers_normalised(ask: Ask, direct: Direct, picture: Image.Image) -> None:
    answer = ask("image_embedding", image=picture)

    expected = direct.embed(picture)
    assert answer == pytest.approx(expected / np.linalg.norm(expected), abs=1e-5)


@pytest.mark.parametrize("task", ["text_embedding", "text_query_embedding"])
@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:9])
def test_text_s_vector_is_that_of_transformers_normalised(ask: Ask, direct: Direct, text: str, task: str) -> None:
    answer = ask(task, text=text)

    expected = direct.embed(text)
    assert answer == pytest.approx(expected / np.linalg.norm(expected), abs=1e-5)


def test_vectors_are_as_the_model_makes_them_if_they_are_not_to_be_normalised(ask: Ask, direct: Direct) -> None:
    image = ask("image_embedding", image=draw(0), config={"normalize": False})
    text = ask("text_embedding", text="a cat", config={"normalize": False})

    assert image == pytest.approx(direct.embed(draw(0)), abs=1e-4)
    assert text == pytest.approx(direct.embed("a cat"), abs=1e-4)
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


def test_a_column_of_pixels_is_a_picture_as_well(ask: Ask) -> None:
    assert np.linalg.norm(ask("image_embedding", image=draw(1, (1, 20_000)))) == pytest.approx(1)


@pytest.mark.parametrize(
    ("task", "body", "field"),
    [
        (TASK, {"image": draw(0), "classes": ["a"], "config": {"template": "a photo"}}, "config.template"),
        ("image_embedding", {"image": draw(0), "config": {"normalize": 1}}, "config.normalize"),
        ("text_embedding", {"text": "a", "config": {"instruction": "a"}}, "config.instruction"),
    ],
    ids=["template", "normalize", "unknown key"],
)
def test_what_config_may_not_hold_is_named(ask: Ask, task: str, body: dict[str, Any], field: str) -> None:
    response = ask.response(task, **body)

    assert (response.status_code, response.json["field"]) == (400, field)


# Some of them

CLIPS = ["clip_vit_large_patch14", "open_clip_vit_b32"]


@pytest.mark.parametrize(
    ("model", "longest"), [*((model, 77) for model in CLIPS), ("siglip2_base_patch16_224", 64)], ids=MODELS
)
def test_tokens_that_were_read_of_a_text_are_counted_without_padding(
    asks: Callable[[str], Ask], model: str, longest: int
) -> None:
    answers = asks(model)("text_embedding", text=["a", "one two three " * 1000], config={"count_tokens": True})

    assert answers[1]["tokens"] == longest
    assert answers[0]["tokens"] < 4
    assert answers[0]["embedding"] == pytest.approx(asks(model)("text_embedding", text="a"), abs=1e-5)


def test_siglip_reads_capitals_as_small_letters(asks: Callable[[str], Ask]) -> None:
    ask = asks("siglip2_base_patch16_224")

    answers = ask("text_embedding", text=["A Cat ON a couch", "a cat on a couch"])
    probabilities = ask(TASK, image=draw(0), classes=["A CAT", "a cat"], config={"template": "The {}"})

    assert answers[0] == pytest.approx(answers[1], abs=1e-6)
    assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-6)


def test_siglip_judges_each_class_by_itself(asks: Callable[[str], Ask]) -> None:
    ask = asks("siglip2_base_patch16_224")

    together = ask(TASK, image=draw(0), classes=CLASSES)
    alone = [ask(TASK, image=draw(0), classes=[name])[0] for name in CLASSES]

    assert together == pytest.approx(alone, abs=1e-5)
    assert sum(together) != pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("model", CLIPS)
def test_clip_has_the_classes_compete(asks: Callable[[str], Ask], model: str) -> None:
    answer = asks(model)(TASK, image=draw(0), classes=CLASSES)

    assert sum(answer) == pytest.approx(1)


@pytest.mark.parametrize("model", CLIPS, scope="module")
@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 5_000)], ids=["column", "row", "strip"])
def test_clip_classifies_a_strip_of_a_picture_by_its_middle(
    asks: Callable[[str], Ask], direct: Direct, model: str, size: tuple[int, int]
) -> None:
    picture = draw(1, size)
    width, height = size
    middle = [width // 2 - 3, height // 2 - 3, width // 2 + 3, height // 2 + 3]
    short = picture.crop((max(0, middle[0]), max(0, middle[1]), min(width, middle[2]), min(height, middle[3])))

    answer = asks(model)(TASK, image=picture, classes=CLASSES)

    assert answer == pytest.approx(direct.classify(short, CLASSES), abs=1e-3)


@pytest.mark.parametrize("model", CLIPS)
@pytest.mark.parametrize(
    ("task", "body"), [(TASK, {"classes": CLASSES}), ("image_embedding", {})], ids=["classes", "vectors"]
)
def test_clip_cuts_a_strip_of_a_picture_before_it_is_enlarged(
    asks: Callable[[str], Ask], monkeypatch: pytest.MonkeyPatch, model: str, task: str, body: dict[str, Any]
) -> None:
    asks(model)(task, image=draw(0), **body)
    plugin = importlib.import_module(f"feature_extraction_server.models.{model}")
    image_processor = plugin.encoder.image_processor
    sizes: list[tuple[int, int]] = []

    def process(images: list[Image.Image], **arguments: Any) -> Any:
        sizes.extend(image.size for image in images)
        return image_processor(images, **arguments)

    monkeypatch.setattr(plugin, "encoder", replace(plugin.encoder, image_processor=process))

    asks(model)(task, image=[draw(0, (2, 9_000)), draw(0, (9_000, 1)), draw(0, (80, 10))], **body)

    assert sizes == [(2, 16), (8, 1), (80, 10)]
