from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from tests.checkpoints import checkpoint
from tests.plugins.asking import PICTURES, Ask, draw

CLASSES = ["cat", "two dogs", "a red square", "cat"]
ALL = {"threshold": 0.0}


@pytest.fixture
def ask(asks: Callable[[str], Ask]) -> Ask:
    return asks("owlvit_base_patch32")


@pytest.fixture(scope="module")
def direct() -> Callable[..., dict[str, list[Any]]]:
    """``direct(picture, classes, threshold)`` gives what transformers alone finds, best first."""
    from transformers import OwlViTForObjectDetection, OwlViTProcessor

    model: Any = OwlViTForObjectDetection.from_pretrained(checkpoint("owlvit_base_patch32"))
    processor: Any = OwlViTProcessor.from_pretrained(checkpoint("owlvit_base_patch32"))

    def detect(picture: Image.Image, classes: list[str], threshold: float = 0.1) -> dict[str, list[Any]]:
        inputs = processor(images=picture.convert("RGB"), text=[classes], truncation=True, return_tensors="pt")
        with torch.inference_mode():
            outputs = model(**inputs)
        (found,) = processor.post_process_grounded_object_detection(
            outputs, threshold=threshold, target_sizes=[(picture.height, picture.width)], text_labels=[classes]
        )
        order = found["scores"].argsort(descending=True, stable=True).tolist()
        return {
            "boxes": [clip(found["boxes"][index].tolist(), picture) for index in order],
            "labels": [found["text_labels"][index] for index in order],
            "scores": [found["scores"][index].item() for index in order],
        }

    return detect


def clip(box: list[float], picture: Image.Image) -> list[float]:
    return [min(max(value, 0), limit) for value, limit in zip(box, picture.size * 2, strict=True)]


def assert_same(answer: dict[str, list[Any]], expected: dict[str, list[Any]]) -> None:
    assert answer["labels"] == expected["labels"]
    assert answer["scores"] == pytest.approx(expected["scores"], abs=1e-5)
    for box, expected_box in zip(answer["boxes"], expected["boxes"], strict=True):
        assert box == pytest.approx(expected_box, abs=1e-2)


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES.keys())
def test_objects_are_those_that_transformers_finds(
    ask: Ask, direct: Callable[..., dict[str, list[Any]]], picture: Image.Image
) -> None:
    answer = ask("object_detection", image=picture, config={"classes": CLASSES})

    assert answer["labels"]
    assert_same(answer, direct(picture, CLASSES))


def test_objects_in_a_batch_are_those_of_its_images_alone(ask: Ask) -> None:
    pictures = list(PICTURES.values())
    config = {"classes": CLASSES, "threshold": 0.05}

    answers = ask("object_detection", image=pictures, config=config)

    for picture, answer in zip(pictures, answers, strict=True):
        assert_same(answer, ask("object_detection", image=picture, config=config))


def test_objects_of_the_coco_catalogue_are_looked_for_by_default(
    ask: Ask, direct: Callable[..., dict[str, list[Any]]]
) -> None:
    from feature_extraction_server.core.detections import COCO_CLASSES

    answer = ask("object_detection", image=draw(0))

    assert len(set(COCO_CLASSES)) == 80
    assert_same(answer, direct(draw(0), COCO_CLASSES))


@pytest.mark.parametrize("size", [(200, 50), (50, 200)], ids=["wide", "high"])
def test_boxes_are_pixels_inside_the_original_image(ask: Ask, size: tuple[int, int]) -> None:
    answer = ask("object_detection", image=draw(0, size), config=ALL)

    assert len(answer["boxes"]) == 64
    for xmin, ymin, xmax, ymax in answer["boxes"]:
        assert 0 <= xmin <= xmax <= size[0]
        assert 0 <= ymin <= ymax <= size[1]
    assert max(box[2] for box in answer["boxes"]) > size[0] / 2
    assert max(box[3] for box in answer["boxes"]) > size[1] / 2


def test_scores_fall_from_the_best_and_stay_above_the_threshold(ask: Ask) -> None:
    scores = ask("object_detection", image=draw(0), config=ALL)["scores"]
    middle = scores[len(scores) // 2]

    answer = ask("object_detection", image=draw(0), config={"threshold": middle})

    assert scores == sorted(scores, reverse=True)
    assert answer["scores"] == [score for score in scores if score > middle]


def test_max_detections_keeps_the_best(ask: Ask) -> None:
    everything = ask("object_detection", image=draw(0), config=ALL)

    answer = ask("object_detection", image=draw(0), config=ALL | {"max_detections": 5})

    assert answer == {key: values[:5] for key, values in everything.items()}


def test_nms_threshold_drops_what_overlaps_a_better_box_of_its_class(ask: Ask) -> None:
    everything = ask("object_detection", image=draw(0), config=ALL | {"classes": CLASSES[:3]})

    answer = ask("object_detection", image=draw(0), config=ALL | {"classes": CLASSES[:3], "nms_threshold": 0.3})

    kept: list[tuple[list[float], str]] = []
    for box, label in zip(everything["boxes"], everything["labels"], strict=True):
        if all(label != other or overlap(box, best) <= 0.3 for best, other in kept):
            kept.append((box, label))
    assert answer["boxes"] == [box for box, _ in kept]
    assert answer["labels"] == [label for _, label in kept]
    assert len(kept) < len(everything["boxes"])


def overlap(first: list[float], second: list[float]) -> float:
    """Return intersection over union."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    intersection = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return intersection / max(1e-9, sum(areas) - intersection)


def test_template_stands_around_every_name(ask: Ask, direct: Callable[..., dict[str, list[Any]]]) -> None:
    config = {"classes": ["cat", "dog"], "template": "a photo of a {}"}

    answer = ask("object_detection", image=draw(0), config=config)

    expected = direct(draw(0), ["a photo of a cat", "a photo of a dog"])
    assert_same(answer, expected | {"labels": [label.removeprefix("a photo of a ") for label in expected["labels"]]})


def test_long_names_are_cut_off_where_the_model_s_positions_end(
    ask: Ask, direct: Callable[..., dict[str, list[Any]]]
) -> None:
    classes = ["one two three " * 20, "a cat"]

    answer = ask("object_detection", image=draw(0), config={"classes": classes})

    assert_same(answer, direct(draw(0), classes))


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"classes": []}, "config.classes"),
        ({"classes": "cat"}, "config.classes"),
        ({"classes": ["cat", 3]}, "config.classes[1]"),
        ({"classes": ["x"] * 1025}, "config.classes"),
        ({"threshold": 1.5}, "config.threshold"),
        ({"threshold": "0.5"}, "config.threshold"),
        ({"nms_threshold": -1}, "config.nms_threshold"),
        ({"max_detections": 0}, "config.max_detections"),
        ({"template": "{} and {}"}, "config.template"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_value_out_of_bounds_is_refused(ask: Ask, config: dict[str, Any], field: str) -> None:
    response = ask.response("object_detection", image=draw(0), config=config)

    assert response.status_code == 400
    assert response.json["field"] == field
