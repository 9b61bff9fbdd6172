from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from tests.checkpoints import checkpoint
from tests.plugins.asking import PICTURES, Ask, draw

PROMPTS = ["a photo of", "a picture of two", "", "one two three four"]


@pytest.fixture
def ask(asks: Callable[[str], Ask]) -> Ask:
    return asks("blip")


@pytest.fixture(scope="module")
def direct() -> Callable[..., list[str]]:
    """``direct(picture, text, **arguments)`` gives what transformers alone generates, the text's beginning included."""
    from transformers import BlipForConditionalGeneration, BlipProcessor

    model: Any = BlipForConditionalGeneration.from_pretrained(checkpoint("blip"))
    processor: Any = BlipProcessor.from_pretrained(checkpoint("blip"))

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
        {"max_length": 9},
        {"min_new_tokens": 60, "max_new_tokens": 61},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": -1.0, "early_stopping": True},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    ],
    ids=lambda config: ",".join(config),
)
def test_config_means_what_it_means_to_transformers(
    ask: Ask, direct: Callable[..., list[str]], config: dict[str, Any]
) -> None:
    arguments = {"max_new_tokens": None} | config if "max_length" in config else config

    answer = ask("image_captioning", image=PICTURES["wide"], config=config)

    assert answer == direct(PICTURES["wide"], **arguments)
    assert len(answer) == config.get("num_return_sequences", 1)


@pytest.mark.parametrize("text", [prompt for prompt in PROMPTS if prompt])
def test_conditional_caption_is_what_follows_the_text(ask: Ask, direct: Callable[..., list[str]], text: str) -> None:
    answer = ask("conditional_image_captioning", image=PICTURES["wide"], text=text)

    (whole,) = direct(PICTURES["wide"], text)
    assert whole.startswith(text)
    assert answer == [whole.removeprefix(text).strip()]


def test_text_s_case_and_accents_do_not_bring_it_into_the_caption(ask: Ask) -> None:
    plain = ask("conditional_image_captioning", image=PICTURES["wide"], text="a photo of")

    answer = ask("conditional_image_captioning", image=PICTURES["wide"], text="  Á PHOTO  Of ")

    assert answer == plain


def test_empty_text_gives_a_free_caption(ask: Ask) -> None:
    answer = ask("conditional_image_captioning", image=PICTURES["wide"], text="")

    assert answer == ask("image_captioning", image=PICTURES["wide"])


def test_caption_may_go_on_inside_the_text_s_last_word(ask: Ask, direct: Callable[..., list[str]]) -> None:
    text = "a picture"
    pictures = [draw(seed) for seed in range(16)]
    rests = [direct(picture, text, max_new_tokens=3)[0].removeprefix(text) for picture in pictures]

    answers = ask("conditional_image_captioning", image=pictures, text=text, config={"max_new_tokens": 3})

    assert any(rest[:1].isalpha() for rest in rests)
    assert answers == [[rest.strip()] for rest in rests]


def test_texts_of_different_lengths_are_answered_in_a_batch_as_alone(ask: Ask) -> None:
    pictures = [draw(seed) for seed in range(len(PROMPTS))]
    config = {"max_length": 20, "num_beams": 2, "num_return_sequences": 2}

    answers = ask("conditional_image_captioning", image=pictures, text=PROMPTS, config=config)

    alone = [
        ask("conditional_image_captioning", image=picture, text=text, config=config)
        for picture, text in zip(pictures, PROMPTS, strict=True)
    ]
    assert answers == alone


def test_equally_long_texts_are_run_in_one_call(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    import feature_extraction_server.models.blip as plugin

    ask("image_captioning", image=draw(0))
    sizes: list[int] = []
    generate = plugin.model.generate

    def count(**arguments: Any) -> torch.Tensor:
        sizes.append(len(arguments["input_ids"]))
        tokens: torch.Tensor = generate(**arguments)
        return tokens

    monkeypatch.setattr(plugin.model, "generate", count)

    ask("conditional_image_captioning", image=[draw(seed) for seed in range(5)], text="a photo of")

    assert sizes == [5]


def test_text_longer_than_the_model_reads_is_refused(ask: Ask) -> None:
    response = ask.response("conditional_image_captioning", image=draw(0), text="a " * 100)

    assert response.status_code == 400
    assert response.json["field"] == "text"
    assert "at most 63" in response.json["error"]


def test_text_of_megabytes_is_refused(ask: Ask) -> None:
    response = ask.response("conditional_image_captioning", image=draw(0), text="a" * 3_000_000)

    assert response.status_code == 400
    assert response.json["field"] == "text"


def test_max_length_that_the_text_fills_is_refused(ask: Ask) -> None:
    response = ask.response("conditional_image_captioning", image=draw(0), text="a photo of", config={"max_length": 4})

    assert response.status_code == 400
    assert response.json["field"] == "config.max_length"


def test_caption_ends_where_the_model_s_positions_end(ask: Ask, direct: Callable[..., list[str]]) -> None:
    config = {"min_new_tokens": 1024, "max_new_tokens": 1024}

    answer = ask("image_captioning", image=draw(0), config=config)

    assert answer == direct(draw(0), min_new_tokens=63, max_new_tokens=63)
