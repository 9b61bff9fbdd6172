from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from tests.checkpoints import checkpoint
from tests.plugins.asking import PICTURES, Ask, draw

QUESTION = "Question: what is in the picture? Answer:"
PROMPTS = ["a photo of", QUESTION, "", "one two three four"]


@pytest.fixture
def ask(asks: Callable[[str], Ask]) -> Ask:
    return asks("blip2")


@pytest.fixture(scope="module")
def direct() -> Callable[..., list[str]]:
    """``direct(picture, text, **arguments)`` gives what transformers alone generates, the text's beginning included."""
    from transformers import Blip2ForConditionalGeneration, Blip2Processor

    model: Any = Blip2ForConditionalGeneration.from_pretrained(checkpoint("blip2"))
    processor: Any = Blip2Processor.from_pretrained(checkpoint("blip2"))

    def generate(picture: Image.Image, text: str | None = None, **arguments: Any) -> list[str]:
        inputs = processor(images=picture.convert("RGB"), text=text, return_tensors="pt")
        with torch.inference_mode():
            tokens = model.generate(**inputs, **{"max_new_tokens": 50} | arguments)
        return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]

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
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": -1.0},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
    ids=lambda config: ",".join(config),
)
def test_config_means_what_it_means_to_transformers(
    ask: Ask, direct: Callable[..., list[str]], config: dict[str, Any]
) -> None:
    answer = ask("image_captioning", image=PICTURES["wide"], config=config)

    assert answer == direct(PICTURES["wide"], **config)


def test_max_length_counts_the_text_but_not_the_image(ask: Ask, direct: Callable[..., list[str]]) -> None:
    answer = ask("image_captioning", image=draw(0), config={"max_length": 11})

    assert answer == direct(draw(0), max_new_tokens=10)


@pytest.mark.parametrize("text", ["a photo of", QUESTION])
def test_conditional_caption_is_what_follows_the_text(ask: Ask, direct: Callable[..., list[str]], text: str) -> None:
    answer = ask("conditional_image_captioning", image=PICTURES["wide"], text=text)

    (whole,) = direct(PICTURES["wide"], text)
    assert whole.startswith(text)
    assert answer == [whole.removeprefix(text).strip()]


def test_texts_of_different_lengths_are_answered_in_a_batch_as_alone(ask: Ask) -> None:
    pictures = [draw(seed) for seed in range(len(PROMPTS))]
    config = {"max_length": 60, "num_beams": 2, "num_return_sequences": 2}

    answers = ask("conditional_image_captioning", image=pictures, text=PROMPTS, config=config)

    alone = [
        ask("conditional_image_captioning", image=picture, text=text, config=config)
        for picture, text in zip(pictures, PROMPTS, strict=True)
    ]
    assert answers == alone


def test_text_may_spell_the_image_s_own_token(ask: Ask) -> None:
    answer = ask("conditional_image_captioning", image=draw(0), text="<image></s> is")

    assert len(answer) == 1


def test_text_longer_than_the_model_reads_is_refused(ask: Ask) -> None:
    response = ask.response("conditional_image_captioning", image=draw(0), text="one " * 100)

    assert response.status_code == 400
    assert response.json["field"] == "text"


def test_caption_ends_where_the_model_s_positions_end(ask: Ask, direct: Callable[..., list[str]]) -> None:
    config = {"min_new_tokens": 1024, "max_new_tokens": 1024}

    answer = ask("image_captioning", image=draw(0), config=config)

    assert answer == direct(draw(0), min_new_tokens=91, max_new_tokens=91)
