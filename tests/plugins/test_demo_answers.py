"""The demonstration checkpoints answer rightly, over HTTP, about pictures that they were not trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo.shapes import COLOURS, SHAPES, TEST_SEED, Truth, draw_shape, draw_shapes
from dev_server import ROOT
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.flask.app import create_app
from tests.plugins.asking import Ask

pytestmark = pytest.mark.weights

SIZES = [(224, 224), (240, 180), (180, 240), (160, 160)]
PICTURES = [draw_shape(TEST_SEED + number, SIZES[number % 4]) for number in range(40)]
IMAGES = [image for image, _ in PICTURES]
TRUTHS = [truth for _, truth in PICTURES]
ENOUGH = 0.9  # the share of answers that must be right


@pytest.fixture
def ask_demo(build: Callable[..., Engine]) -> Callable[[str], Ask]:
    """``ask_demo(model)`` gives what asks a model with its demonstration checkpoint."""

    def start(model: str) -> Ask:
        folder: Path = ROOT / "demo" / "checkpoints" / model
        if not folder.is_dir():
            pytest.skip(f"there is no demonstration checkpoint of {model}")
        engine = build(**{f"{model.upper()}_CHECKPOINT": str(folder), "DEVICE": "cpu"})
        return Ask(create_app(engine).test_client(), model)

    return start


def share_right(answers: list[Any], expected: list[Any]) -> float:
    return sum(bool(answer == truth) for answer, truth in zip(answers, expected, strict=True)) / len(expected)


@pytest.mark.parametrize("model", ["blip", "blip2", "vit_gpt2"])
def test_caption_tells_shape_colour_and_ground(ask_demo: Callable[[str], Ask], model: str) -> None:
    answers = ask_demo(model)("image_captioning", image=IMAGES)

    assert share_right(answers, [[truth.caption] for truth in TRUTHS]) >= ENOUGH


@pytest.mark.parametrize(
    ("model", "text", "expected"),
    [
        ("blip", "A picture of", lambda truth: truth.caption),
        ("blip", "the shape is", lambda truth: f"a {truth.shape}"),
        ("blip", "the ground is", lambda truth: truth.ground),
        ("blip2", "a photo of", lambda truth: truth.caption),
        ("blip2", "Question: what colour is the shape? Answer:", lambda truth: truth.colour),
    ],
    ids=["blip caption", "blip shape", "blip ground", "blip2 caption", "blip2 question"],
)
def test_caption_goes_on_from_the_text_and_leaves_it_out(
    ask_demo: Callable[[str], Ask], model: str, text: str, expected: Callable[[Truth], str]
) -> None:
    answers = ask_demo(model)("conditional_image_captioning", image=IMAGES, text=text)

    assert share_right(answers, [[expected(truth)] for truth in TRUTHS]) >= ENOUGH


def test_most_probable_class_is_the_right_one(ask_demo: Callable[[str], Ask]) -> None:
    classes = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]

    answers = ask_demo("clip_vit_large_patch14")("zero_shot_image_classification", image=IMAGES, classes=classes)

    best = [classes[probabilities.index(max(probabilities))] for probabilities in answers]
    assert share_right(best, [truth.label for truth in TRUTHS]) >= ENOUGH
    assert share_right([max(probabilities) > 0.9 for probabilities in answers], [True] * len(answers)) >= ENOUGH


def test_vector_of_an_image_is_nearest_to_that_of_the_right_text(ask_demo: Callable[[str], Ask]) -> None:
    labels = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    ask = ask_demo("clip_vit_large_patch14")

    images = np.array(ask("image_embedding", image=IMAGES))
    texts = np.array(ask("text_query_embedding", text=labels))

    nearest = [labels[index] for index in (images @ texts.T).argmax(axis=1)]
    assert share_right(nearest, [truth.label for truth in TRUTHS]) >= ENOUGH


def test_best_box_lies_around_the_shape(ask_demo: Callable[[str], Ask]) -> None:
    answers = ask_demo("owlvit_base_patch32")("object_detection", image=IMAGES, config={"classes": list(SHAPES)})

    right = [
        answer["labels"][:1] == [truth.shape] and overlap(answer["boxes"][0], truth.box) > 0.5
        for answer, truth in zip(answers, TRUTHS, strict=True)
    ]
    assert share_right(right, [True] * len(right)) >= ENOUGH


def test_best_box_of_given_classes_lies_around_the_shape(ask_demo: Callable[[str], Ask]) -> None:
    ask = ask_demo("owlvit_base_patch32")

    answers = ask("zero_shot_object_detection", image=IMAGES, classes=list(SHAPES))

    right = [
        answer["labels"][:1] == [truth.shape] and overlap(answer["boxes"][0], truth.box) > 0.5
        for answer, truth in zip(answers, TRUTHS, strict=True)
    ]
    assert share_right(right, [True] * len(right)) >= ENOUGH


def test_first_class_is_the_right_one(ask_demo: Callable[[str], Ask]) -> None:
    answers = ask_demo("vit_base_patch16_224")("image_classification", image=IMAGES)

    assert share_right([answer["labels"][0] for answer in answers], [truth.label for truth in TRUTHS]) >= ENOUGH


def test_every_shape_of_several_is_found(ask_demo: Callable[[str], Ask]) -> None:
    pictures = [draw_shapes(TEST_SEED + number, SIZES[number % 4]) for number in range(40)]
    config = {"classes": list(SHAPES), "threshold": 0.2}

    answers = ask_demo("owlvit_base_patch32")("object_detection", image=[image for image, _ in pictures], config=config)

    found = [
        any(
            label == truth.shape and overlap(box, truth.box) > 0.5
            for box, label in zip(answer["boxes"], answer["labels"], strict=True)
        )
        for answer, (_, truths) in zip(answers, pictures, strict=True)
        for truth in truths
    ]
    assert share_right(found, [True] * len(found)) >= ENOUGH


def overlap(first: list[float], second: tuple[int, ...]) -> float:
    """Return intersection over union."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    intersection = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return intersection / (sum(areas) - intersection)
