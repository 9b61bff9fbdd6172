"""A request's ``config``: what a model declares is all that reaches it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field

from feature_extraction_server.core.config import MAX_NEW_TOKENS, Config, GenerationConfig, check_config
from feature_extraction_server.core.errors import InvalidInput


class Detection(Config):
    threshold: float = Field(0.1, ge=0, le=1)
    classes: list[str] | None = Field(None, min_length=1)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"max_new_tokens": 20}, id="tokens"),
        pytest.param({"num_beams": 3, "num_return_sequences": 3}, id="as many sequences as beams"),
        pytest.param({"do_sample": True, "num_return_sequences": 4, "temperature": 0.5}, id="sampling"),
        pytest.param({"min_length": 5, "max_length": 5}, id="equal bounds"),
        pytest.param({"repetition_penalty": 2}, id="a whole number where a fraction may stand"),
        pytest.param({"num_beams": 2, "early_stopping": True, "length_penalty": -1.0}, id="beams"),
    ],
)
def test_allowed_keys_reach_the_model_as_sent(config: dict[str, Any]) -> None:
    assert check_config(GenerationConfig, config) == config


def test_null_counts_as_not_sent() -> None:
    assert check_config(GenerationConfig, {"max_length": None, "num_beams": 3}) == {"num_beams": 3}


@pytest.mark.parametrize(
    "key",
    [
        *("trust_remote_code", "cache_dir", "generation_config", "logits_processor", "stopping_criteria", "streamer"),
        *("assistant_model", "return_dict_in_generate", "use_cache", "token", "__class__", "model_config", "inputs"),
    ],
)
def test_key_that_is_not_declared_is_refused_by_name(key: str) -> None:
    with pytest.raises(InvalidInput, match=f"unknown key config.{key}: for this model, config takes") as caught:
        check_config(GenerationConfig, {key: "x"})

    assert caught.value.field == f"config.{key}"


@pytest.mark.parametrize(
    ("config", "field"),
    [
        pytest.param({"max_new_tokens": 0}, "config.max_new_tokens", id="no token"),
        pytest.param({"max_new_tokens": MAX_NEW_TOKENS + 1}, "config.max_new_tokens", id="too many tokens"),
        pytest.param({"max_length": 10**9}, "config.max_length", id="a huge length"),
        pytest.param({"num_beams": 10**300}, "config.num_beams", id="a huge number"),
        pytest.param({"max_new_tokens": "20"}, "config.max_new_tokens", id="a number as text"),
        pytest.param({"max_new_tokens": 20.5}, "config.max_new_tokens", id="half a token"),
        pytest.param({"max_new_tokens": True}, "config.max_new_tokens", id="true for a number"),
        pytest.param({"do_sample": 1}, "config.do_sample", id="a number for true"),
        pytest.param({"do_sample": "true"}, "config.do_sample", id="a text for true"),
        pytest.param({"temperature": 0}, "config.temperature", id="no temperature"),
        pytest.param({"temperature": float("nan")}, "config.temperature", id="NaN"),
        pytest.param({"top_p": 1.5}, "config.top_p", id="a probability over 1"),
        pytest.param({"num_return_sequences": 2}, "config", id="more sequences than beams"),
        pytest.param({"top_k": 3}, "config", id="sampling without do_sample"),
        pytest.param({"length_penalty": 1.0}, "config", id="a penalty of beams without beams"),
        pytest.param({"max_length": 9, "max_new_tokens": 5}, "config", id="two lengths"),
        pytest.param({"min_length": 6, "max_length": 5}, "config", id="crossing bounds"),
        pytest.param({"min_new_tokens": 6, "max_new_tokens": 5}, "config", id="crossing bounds of tokens"),
    ],
)
def test_value_that_is_not_allowed_is_refused_by_name(config: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_config(GenerationConfig, config)

    assert caught.value.field == field
    assert caught.value.message.startswith(f"{field}: ")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"threshold": 2}, "config.threshold"),
        ({"classes": []}, "config.classes"),
        ({"classes": ["a", 1]}, "config.classes[1]"),
        ({"max_new_tokens": 3}, "config.max_new_tokens"),
    ],
    ids=["out of range", "empty list", "a number in a list", "another model's key"],
)
def test_models_own_declaration_is_applied(config: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_config(Detection, config)

    assert caught.value.field == field
