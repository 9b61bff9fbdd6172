from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from tests.checkpoints import checkpoint
from tests.plugins.asking import PICTURES, Ask, draw


@pytest.fixture
def ask(asks: Callable[[str], Ask]) -> Ask:
    return asks("vit_gpt2")


@pytest.fixture(scope="module")
def direct() -> Callable[..., list[str]]:
    """``direct(picture, **arguments)`` gives what transformers alone generates."""
    from transformers import AutoTokenizer, VisionEncoderDecoderModel, ViTImageProcessorPil

    model: Any = VisionEncoderDecoderModel.from_pretrained(checkpoint("vit_gpt2"))
    image_processor: Any = ViTImageProcessorPil.from_pretrained(checkpoint("vit_gpt2"))
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint("vit_gpt2"))

    def generate(picture: Image.Image, **arguments: Any) -> list[str]:
        pixels = image_processor(picture.convert("RGB"), return_tensors="pt").pixel_values
        with torch.inference_mode():
            tokens = model.generate(pixels, **{"max_new_tokens": 50} | arguments)
        return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    return generate


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES.keys())
def test_caption_is_the_one_that_transformers_gives(
    ask: Ask, direct: Callable[..., list[str]], picture: Image.Image
) -> None:
    answer = ask("image_captioning", image=picture)

    assert answer == direct(picture)


def test_captions_of_a_batch_are_those_of_its_images_alone(ask: Ask) -> None:
    pictures = list(PICTURES.values())

    answers = ask("image_captioning", image=pictures)

    assert answers == [ask("image_captioning", image=picture) for picture in pictures]
    assert len({tuple(answer) for answer in answers}) > 3


@pytest.mark.parametrize(
    "config",
    [
        {"max_new_tokens": 5},
        {"max_length": 9},
        {"max_length": 16, "num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 3},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
    ids=lambda config: ",".join(config),
)
def test_config_means_what_it_means_to_transformers(
    ask: Ask, direct: Callable[..., list[str]], config: dict[str, Any]
) -> None:
    arguments = {"max_new_tokens": None} | config if "max_length" in config else config

    answer = ask("image_captioning", image=PICTURES["wide"], config=config)

    assert answer == direct(PICTURES["wide"], **arguments)


def test_caption_ends_where_the_model_s_positions_end(ask: Ask, direct: Callable[..., list[str]]) -> None:
    config = {"min_new_tokens": 1024, "max_new_tokens": 1024}

    answer = ask("image_captioning", image=draw(0), config=config)

    assert answer == direct(draw(0), min_new_tokens=63, max_new_tokens=63)
