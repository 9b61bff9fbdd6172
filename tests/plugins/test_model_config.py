from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from feature_extraction_server.core.config import CatalogueConfig, GenerationConfig, check_config
from feature_extraction_server.core.errors import InvalidInput
from feature_extraction_server.core.generation import continue_prompts, generation_arguments
from tests.plugins.asking import Ask, draw

MODELS_AND_TASKS = [
    ("blip", "image_captioning"),
    ("blip", "conditional_image_captioning"),
    ("blip2", "image_captioning"),
    ("blip2", "conditional_image_captioning"),
    ("vit_gpt2", "image_captioning"),
    ("clip_vit_large_patch14", "zero_shot_image_classification"),
    ("owlvit_base_patch32", "object_detection"),
    ("owlvit_base_patch32", "zero_shot_object_detection"),
    ("grounding_dino_tiny", "object_detection"),
    ("grounding_dino_tiny", "zero_shot_object_detection"),
    ("detr_resnet101", "object_detection"),
    ("vit_base_patch16_224", "image_classification"),
]
OTHER_FIELDS: dict[str, dict[str, Any]] = {
    "conditional_image_captioning": {"text": "a"},
    "zero_shot_image_classification": {"classes": ["a cat"]},
    "zero_shot_object_detection": {"classes": ["a cat"]},
}
UNSAFE_KEYS = [
    "nonsense",
    "trust_remote_code",
    "custom_generate",
    "logits_processor",
    "stopping_criteria",
    "assistant_model",
    "generation_config",
    "return_dict_in_generate",
    "output_scores",
    "cache_implementation",
    "pixel_values",
    "__class__",
]


@pytest.mark.parametrize(("model", "task"), MODELS_AND_TASKS)
@pytest.mark.parametrize("key", UNSAFE_KEYS)
def test_unknown_key_is_a_400_that_names_it_and_loads_nothing(
    asks: Callable[[str], Ask], model: str, task: str, key: str
) -> None:
    response = asks(model).response(task, image=draw(0), config={key: True}, **OTHER_FIELDS.get(task, {}))

    assert response.status_code == 400
    assert response.json["field"] == f"config.{key}"
    assert key in response.json["error"]


@pytest.mark.parametrize(
    "config",
    [
        {"max_new_tokens": 1025},
        {"max_new_tokens": 0},
        {"max_new_tokens": 5.0},
        {"max_new_tokens": True},
        {"max_length": 1},
        {"num_beams": 17},
        {"num_beams": "2"},
        {"num_return_sequences": 17},
        {"do_sample": 1},
        {"do_sample": True, "temperature": 0},
        {"do_sample": True, "temperature": float("nan")},
        {"do_sample": True, "top_p": 1.5},
        {"do_sample": True, "top_k": 0},
        {"repetition_penalty": 0},
        {"num_beams": 2, "length_penalty": 1e9},
        {"num_beams": 2, "early_stopping": "never"},
    ],
    ids=str,
)
def test_generation_value_out_of_bounds_is_refused_by_its_name(config: dict[str, Any]) -> None:
    key = list(config)[-1]

    with pytest.raises(InvalidInput) as raised:
        check_config(GenerationConfig, config)

    assert raised.value.field == f"config.{key}"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_return_sequences": 2}, "num_return_sequences may not exceed num_beams"),
        ({"num_return_sequences": 3, "num_beams": 2, "do_sample": True}, "num_return_sequences may not exceed"),
        ({"max_new_tokens": 5, "max_length": 9}, "max_new_tokens and max_length exclude each other"),
        ({"min_new_tokens": 5, "min_length": 9}, "min_new_tokens and min_length exclude each other"),
        ({"min_new_tokens": 6, "max_new_tokens": 5}, "min_new_tokens may not exceed max_new_tokens"),
        ({"min_length": 6, "max_length": 5}, "min_length may not exceed max_length"),
        ({"temperature": 0.5}, "temperature has no effect unless do_sample"),
        ({"top_k": 5}, "top_k has no effect unless do_sample"),
        ({"top_p": 0.5, "do_sample": False}, "top_p has no effect unless do_sample"),
        ({"length_penalty": 1.0}, "length_penalty has no effect unless num_beams"),
        ({"early_stopping": True, "num_beams": 1}, "early_stopping has no effect unless num_beams"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_generation_values_that_do_not_fit_together_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        check_config(GenerationConfig, config)


def test_checked_config_has_the_keys_that_were_sent_but_nulls() -> None:
    config = check_config(GenerationConfig, {"num_beams": 1, "max_length": None, "do_sample": False})

    assert config == {"num_beams": 1, "do_sample": False}


@pytest.mark.parametrize("template", ["", "{", "cat", "{} {}", "x" * 199 + "{}"], ids=lambda template: template[:5])
def test_template_without_just_one_place_is_refused(template: str) -> None:
    with pytest.raises(InvalidInput, match=r"config\.template"):
        check_config(CatalogueConfig, {"template": template})


@pytest.mark.parametrize(
    ("config", "n_prompt", "expected"),
    [
        ({}, 4, {"max_new_tokens": 50}),
        ({"max_new_tokens": 7}, 4, {"max_new_tokens": 7}),
        ({"max_length": 9}, 4, {"max_new_tokens": 5}),
        ({"max_new_tokens": 1000}, 4, {"max_new_tokens": 96}),
        ({"max_length": 1000}, 4, {"max_new_tokens": 96}),
        ({"min_new_tokens": 60}, 4, {"max_new_tokens": 60, "min_new_tokens": 60}),
        ({"min_length": 9}, 4, {"max_new_tokens": 50, "min_new_tokens": 5}),
        ({"min_length": 3}, 4, {"max_new_tokens": 50}),
        ({"min_length": 90, "max_new_tokens": 5}, 4, {"max_new_tokens": 5, "min_new_tokens": 5}),
        ({"min_new_tokens": 200}, 4, {"max_new_tokens": 96, "min_new_tokens": 96}),
        ({"num_beams": 3}, 99, {"max_new_tokens": 1, "num_beams": 3}),
    ],
    ids=str,
)
def test_lengths_become_numbers_of_new_tokens(config: dict[str, Any], n_prompt: int, expected: dict[str, Any]) -> None:
    assert generation_arguments(config, n_prompt, 100) == expected


@pytest.mark.parametrize(
    ("config", "n_prompt", "field"),
    [({}, 100, "text"), ({"max_length": 5}, 5, "config.max_length")],
    ids=["no positions left", "max_length reached"],
)
def test_prompt_that_leaves_no_room_is_refused(config: dict[str, Any], n_prompt: int, field: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        generation_arguments(config, n_prompt, 100)

    assert raised.value.field == field


def test_prompts_of_one_length_are_run_together_and_answers_keep_their_order() -> None:
    from transformers import GPT2Config

    class Tokenizer:
        def batch_decode(self, tokens: torch.Tensor, skip_special_tokens: bool) -> list[str]:
            return [f" {row} " for row in tokens.tolist()]

    calls: list[list[int]] = []

    class Model:
        config = GPT2Config(n_positions=9)

        def generate(self, pixel_values: torch.Tensor, input_ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
            calls.append(pixel_values.tolist())
            continued = torch.cat([input_ids, pixel_values[:, None] + 10], dim=1)
            return continued.repeat_interleave(2, dim=0)

    captions = continue_prompts(Model(), Tokenizer(), torch.arange(3), [[1, 2], [1], [3, 4]], {})

    assert calls == [[1], [0, 2]]
    assert captions == [["[10]", "[10]"], ["[11]", "[11]"], ["[12]", "[12]"]]
