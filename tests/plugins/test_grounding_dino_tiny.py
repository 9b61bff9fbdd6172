from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from tests.checkpoints import checkpoint
from tests.plugins.asking import PICTURES, Ask, draw
from tests.plugins.detecting import assert_same_detections, best_first

TASK = "zero_shot_object_detection"
CLASSES = ["cat", "Two dogs ", "a red square"]
ALL = {"threshold": 0}


@pytest.fixture
def ask(asks: Callable[[str], Ask]) -> Ask:
    return asks("grounding_dino_tiny")


@pytest.fixture(scope="module")
def direct() -> Callable[..., dict[str, list[Any]]]:
    """``direct(picture, classes, threshold)`` gives what transformers alone finds, best first.

    The tokens between the names are left out of the scores, which transformers lets them take part in.
    """
    from transformers import (
        AutoTokenizer,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessorPil,
        GroundingDinoProcessor,
    )
    from transformers.models.grounding_dino.modeling_grounding_dino import build_label_maps

    folder = checkpoint("grounding_dino_tiny")
    model: Any = GroundingDinoForObjectDetection.from_pretrained(folder)
    image_processor = GroundingDinoImageProcessorPil.from_pretrained(folder)
    processor: Any = GroundingDinoProcessor(image_processor, AutoTokenizer.from_pretrained(folder))

    def detect(picture: Image.Image, classes: list[str], threshold: float = 0.25) -> dict[str, list[Any]]:
        inputs = processor(images=picture.convert("RGB"), text=[classes], return_tensors="pt")
        with torch.inference_mode():
            outputs = model(**inputs)
        (owned,) = build_label_maps(outputs.logits, inputs.input_ids)  # (n_classes, n_tokens)
        outputs.logits = outputs.logits.masked_fill(~owned.any(dim=0), -torch.inf)
        size = (picture.height, picture.width)
        (found,) = processor.post_process_grounded_object_detection(outputs, threshold=threshold, target_sizes=[size])
        best = outputs.logits[0].sigmoid().max(dim=-1)
        owners = owned[:, best.indices[best.values > threshold]].argmax(dim=0)
        return best_first(found["boxes"], [classes[owner] for owner in owners.tolist()], found["scores"], picture)

    return detect


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES.keys())
def test_objects_are_those_that_transformers_finds(
    ask: Ask, direct: Callable[..., dict[str, list[Any]]], picture: Image.Image
) -> None:
    answer = ask(TASK, image=picture, classes=CLASSES)

    assert answer["labels"]
    assert_same_detections(answer, direct(picture, CLASSES))


def test_objects_in_a_batch_of_many_forms_are_those_of_its_images_alone(
    ask: Ask, direct: Callable[..., dict[str, list[Any]]]
) -> None:
    pictures = [*PICTURES.values(), draw(7)]

    answers = ask(TASK, image=pictures, classes=CLASSES, config=ALL)

    for picture, answer in zip(pictures, answers, strict=True):
        assert_same_detections(answer, direct(picture, CLASSES, 0))


def test_labels_are_the_classes_as_they_were_sent(ask: Ask) -> None:
    answer = ask(TASK, image=draw(0), classes=["The CAT.", " two  dogs"], config=ALL)

    assert set(answer["labels"]) == {"The CAT.", " two  dogs"}


def test_stop_within_a_name_is_not_its_end(ask: Ask) -> None:
    answer = ask(TASK, image=draw(0), classes=["a. red? cat", "dog"], config=ALL)

    expected = ask(TASK, image=draw(0), classes=["a red cat", "dog"], config=ALL)
    assert answer["scores"] == pytest.approx(expected["scores"], abs=1e-5)
    assert answer["labels"] == [label.replace("a red cat", "a. red? cat") for label in expected["labels"]]


def test_classes_that_one_prompt_does_not_hold_are_looked_for_in_several(
    ask: Ask, direct: Callable[..., dict[str, list[Any]]]
) -> None:
    first = ["a red square", "two dogs", "a person", "the snow", "a bicycle", "a couch", "the circle"]  # 22 tokens, all
    second = ["a cat", "the picture"]

    answer = ask(TASK, image=draw(0), classes=first + second, config=ALL)

    parts = [direct(draw(0), part, 0) for part in (first, second)]
    assert len(answer["scores"]) == 24
    assert sorted(answer["scores"]) == pytest.approx(sorted(parts[0]["scores"] + parts[1]["scores"]), abs=1e-4)
    assert answer["scores"] == sorted(answer["scores"], reverse=True)
    assert set(parts[1]["labels"]) <= set(answer["labels"])


@pytest.mark.parametrize("name", ["", " . ", "?"], ids=["empty", "stop", "question mark"])
def test_class_without_a_word_is_never_found(ask: Ask, name: str) -> None:
    answer = ask(TASK, image=draw(0), classes=[name, "cat"], config=ALL)

    assert set(answer["labels"]) == {"cat"}
    assert ask(TASK, image=draw(0), classes=[name], config=ALL) == {"boxes": [], "labels": [], "scores": []}


def test_long_name_is_cut_off_where_the_model_s_positions_end(ask: Ask) -> None:
    answer = ask(TASK, image=draw(0), classes=["cat " * 1000], config=ALL)

    expected = ask(TASK, image=draw(0), classes=["cat " * 21], config=ALL)
    assert answer["scores"] == expected["scores"]


def test_objects_of_the_coco_catalogue_are_looked_for_by_default(ask: Ask) -> None:
    from feature_extraction_server.core.detections import COCO_CLASSES

    answer = ask("object_detection", image=draw(0), config=ALL)

    assert answer == ask(TASK, image=draw(0), classes=COCO_CLASSES, config=ALL)
    assert len(set(answer["labels"])) > 1


def test_catalogue_may_be_named_in_the_config(ask: Ask, direct: Callable[..., dict[str, list[Any]]]) -> None:
    answer = ask("object_detection", image=draw(0), config={"classes": CLASSES})

    assert_same_detections(answer, direct(draw(0), CLASSES))


@pytest.mark.parametrize(
    ("config", "field"),
    [({"classes": ["cat"]}, "config.classes"), ({"threshold": 2}, "config.threshold")],
    ids=["classes in the config", "threshold"],
)
def test_config_that_the_task_does_not_take_is_refused(ask: Ask, config: dict[str, Any], field: str) -> None:
    response = ask.response(TASK, image=draw(0), classes=CLASSES, config=config)

    assert response.status_code == 400
    assert response.json["field"] == field
