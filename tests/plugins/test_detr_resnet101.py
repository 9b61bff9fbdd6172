from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from feature_extraction_server.core.detections import Found
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.flask.app import create_app
from tests.checkpoints import checkpoint
from tests.plugins.asking import PICTURES, Ask, draw
from tests.plugins.detecting import assert_same_detections, best_first

TASK = "object_detection"


@pytest.fixture
def ask(asks: Callable[[str], Ask]) -> Ask:
    return asks("detr_resnet101")


@pytest.fixture(scope="module")
def direct() -> Callable[..., dict[str, list[Any]]]:
    """``direct(picture, threshold)`` gives what transformers alone finds, best first."""
    from transformers import DetrForObjectDetection, DetrImageProcessorPil

    model: Any = DetrForObjectDetection.from_pretrained(checkpoint("detr_resnet101"))
    processor: Any = DetrImageProcessorPil.from_pretrained(checkpoint("detr_resnet101"))

    def detect(picture: Image.Image, threshold: float = 0.5) -> dict[str, list[Any]]:
        with torch.inference_mode():
            outputs = model(**processor(picture.convert("RGB"), return_tensors="pt"))
        size = (picture.height, picture.width)
        (found,) = processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=[size])
        labels = [model.config.id2label[label] for label in found["labels"].tolist()]
        return best_first(found["boxes"], labels, found["scores"], picture)

    return detect


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES.keys())
def test_objects_are_those_that_transformers_finds(
    ask: Ask, direct: Callable[..., dict[str, list[Any]]], picture: Image.Image
) -> None:
    answer = ask(TASK, image=picture, config={"threshold": 0.1})

    assert answer["labels"]
    assert_same_detections(answer, direct(picture, 0.1))


def test_threshold_is_one_half_by_default(ask: Ask, direct: Callable[..., dict[str, list[Any]]]) -> None:
    assert_same_detections(ask(TASK, image=draw(0)), direct(draw(0), 0.5))


def test_objects_in_a_batch_of_many_forms_are_those_of_its_images_alone(
    ask: Ask, direct: Callable[..., dict[str, list[Any]]]
) -> None:
    pictures = [*PICTURES.values(), draw(7), *PICTURES.values()]

    answers = ask(TASK, image=pictures, config={"threshold": 0})

    for picture, answer in zip(pictures, answers, strict=True):
        assert_same_detections(answer, direct(picture, 0))


def test_pictures_of_one_size_go_through_the_model_together(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    from feature_extraction_server.models import detr_resnet101

    ask(TASK, image=draw(0))  # so that it is loaded
    sizes: list[tuple[int, ...]] = []
    find = detr_resnet101._find

    def record(pixels: torch.Tensor) -> Found:
        sizes.append(tuple(pixels.shape))
        return find(pixels)

    monkeypatch.setattr(detr_resnet101, "_find", record)

    ask(TASK, image=[draw(0), draw(1, (60, 80)), draw(2), draw(3, (160, 120))])

    assert sorted(sizes) == [(1, 3, 128, 96), (3, 3, 96, 128)]


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (3, 600)], ids=["column", "row", "strip"])
def test_boxes_in_a_strip_of_a_picture_lie_inside_it(ask: Ask, size: tuple[int, int]) -> None:
    answer = ask(TASK, image=draw(1, size), config={"threshold": 0})

    assert len(answer["boxes"]) == 12
    for xmin, ymin, xmax, ymax in answer["boxes"]:
        assert 0 <= xmin <= xmax <= size[0]
        assert 0 <= ymin <= ymax <= size[1]
    assert max(box[2] for box in answer["boxes"]) > size[0] / 4
    assert max(box[3] for box in answer["boxes"]) > size[1] / 4


def test_checkpoint_whose_backbone_is_timm_s_is_a_503_that_names_the_library(
    build: Callable[..., Engine], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("detr_resnet101"), tmp_path / "timm"))
    config = json.loads((folder / "config.json").read_text())
    timm = {"backbone": "resnet101", "backbone_config": None, "use_timm_backbone": True}
    (folder / "config.json").write_text(json.dumps(config | timm))
    client = create_app(build(DETR_RESNET101_CHECKPOINT=str(folder), DEVICE="cpu")).test_client()

    response = Ask(client, "detr_resnet101").response(TASK, image=draw(0))

    assert response.status_code == 503
    assert f"{folder} is incomplete or broken" in response.json["error"]
    assert "timm" in response.json["error"]
