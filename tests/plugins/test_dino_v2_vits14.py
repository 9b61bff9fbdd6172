from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.checkpoints import checkpoint, transformers
from tests.plugins.asking import PICTURES, Ask, draw

TASK = "image_embedding"


@pytest.fixture
def ask(asks: Callable[[str], Ask]) -> Ask:
    return asks("dino_v2_vits14")


@pytest.fixture(scope="module")
def direct() -> Callable[[Image.Image], Any]:
    """``direct(picture)`` gives the state of the class token that transformers alone gives."""
    folder = checkpoint("dino_v2_vits14")
    model = transformers().AutoModel.from_pretrained(folder)
    image_processor = transformers().AutoImageProcessor.from_pretrained(folder)

    def embed(picture: Image.Image) -> Any:
        with torch.inference_mode():
            pixels = image_processor(images=picture.convert("RGB"), return_tensors="pt")
            return model(**pixels).last_hidden_state[0, 0].numpy()

    return embed


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES.keys())
def test_vector_is_the_normalised_class_token_of_transformers(
    ask: Ask, direct: Callable[[Image.Image], Any], picture: Image.Image
) -> None:
    answer = ask(TASK, image=picture)

    expected = direct(picture)
    assert answer == pytest.approx(expected / np.linalg.norm(expected), abs=1e-5)


def test_vector_has_the_model_s_own_length_if_it_is_not_to_be_normalised(
    ask: Ask, direct: Callable[[Image.Image], Any]
) -> None:
    answer = ask(TASK, image=draw(0), config={"normalize": False})

    assert answer == pytest.approx(direct(draw(0)), abs=1e-4)
    assert np.linalg.norm(answer) > 1.5


def test_vectors_of_a_batch_are_those_of_its_images_alone(ask: Ask) -> None:
    answers = ask(TASK, image=list(PICTURES.values()))

    for picture, answer in zip(PICTURES.values(), answers, strict=True):
        assert answer == pytest.approx(ask(TASK, image=picture), abs=1e-5)


def test_strip_of_a_picture_is_embedded_by_its_middle(ask: Ask) -> None:
    picture = draw(1, (20_000, 3))

    answer = ask(TASK, image=picture)

    assert answer == pytest.approx(ask(TASK, image=picture.crop((9_990, 0, 10_010, 3))), abs=1e-3)


@pytest.mark.parametrize(
    ("config", "field"),
    [({"normalize": "yes"}, "config.normalize"), ({"template": "{}"}, "config.template")],
    ids=["wrong type", "unknown key"],
)
def test_what_config_may_not_hold_is_named(ask: Ask, config: dict[str, Any], field: str) -> None:
    response = ask.response(TASK, image=draw(0), config=config)

    assert (response.status_code, response.json["field"]) == (400, field)
