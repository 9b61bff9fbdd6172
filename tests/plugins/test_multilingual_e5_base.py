from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints import checkpoint, transformers
from tests.plugins.asking import Ask

PREFIXES = {"text_embedding": "passage: ", "text_query_embedding": "query: "}
TEXTS = ["a cat on a couch", "", "two dogs in the snow. " * 20, "Ünïcode 漢字", "the red square", "one " * 700]


@pytest.fixture
def ask(asks: Callable[[str], Ask]) -> Ask:
    return asks("multilingual_e5_base")


@pytest.fixture(scope="module")
def direct() -> Callable[[list[str]], Any]:
    """``direct(texts)`` gives what the recipe on the model card gives for texts with their prefixes."""
    folder = checkpoint("multilingual_e5_base")
    model = transformers().AutoModel.from_pretrained(folder)
    tokenizer = transformers().AutoTokenizer.from_pretrained(folder)

    def embed(texts: list[str]) -> Any:
        tokens = tokenizer(texts, max_length=512, padding=True, truncation=True, return_tensors="pt")
        mask = tokens["attention_mask"]
        with torch.inference_mode():
            states = model(**tokens).last_hidden_state.masked_fill(~mask[..., None].bool(), 0.0)
            return (states.sum(dim=1) / mask.sum(dim=1)[..., None]).numpy()

    return embed


@pytest.mark.parametrize("task", PREFIXES)
def test_vectors_are_those_of_the_model_card_s_recipe(ask: Ask, direct: Callable[[list[str]], Any], task: str) -> None:
    answers = ask(task, text=TEXTS)

    expected = direct([PREFIXES[task] + text for text in TEXTS])
    np.testing.assert_allclose(answers, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-4)


@pytest.mark.parametrize("task", PREFIXES)
def test_vectors_of_a_batch_are_those_of_its_texts_alone(ask: Ask, task: str) -> None:
    answers = ask(task, text=TEXTS)

    for text, answer in zip(TEXTS, answers, strict=True):
        assert answer == pytest.approx(ask(task, text=text), abs=1e-4)


def test_query_has_another_vector_than_the_same_text_as_a_passage(ask: Ask) -> None:
    passage, query = (np.array(ask(task, text="a cat")) for task in PREFIXES)

    assert passage @ query < 0.99


def test_vector_has_the_model_s_own_length_if_it_is_not_to_be_normalised(
    ask: Ask, direct: Callable[[list[str]], Any]
) -> None:
    answer = ask("text_embedding", text="a cat", config={"normalize": False})

    assert answer == pytest.approx(direct(["passage: a cat"])[0], abs=1e-4)
    assert np.linalg.norm(answer) > 1.5


def test_tokens_that_were_read_are_counted_with_those_of_the_prefix(ask: Ask) -> None:
    answers = ask("text_query_embedding", text=["a cat", "", "one " * 700], config={"count_tokens": True})

    assert [answer["tokens"] for answer in answers] == [5, 3, 512]


@pytest.mark.parametrize(
    ("config", "field"),
    [({"normalize": 1}, "config.normalize"), ({"instruction": "a"}, "config.instruction")],
    ids=["wrong type", "unknown key"],
)
def test_what_config_may_not_hold_is_named(ask: Ask, config: dict[str, Any], field: str) -> None:
    response = ask.response("text_query_embedding", text="a cat", config=config)

    assert (response.status_code, response.json["field"]) == (400, field)
