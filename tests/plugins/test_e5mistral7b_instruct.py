from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from feature_extraction_server.core.engine import Engine
from feature_extraction_server.flask.app import create_app
from tests.checkpoints import checkpoint, transformers
from tests.plugins.asking import Ask

plugin: Any = importlib.import_module("feature_extraction_server.models.e5mistral7b_instruct")

TEXTS = ["a cat on a couch", "", "two dogs in the snow." * 20, "Ünïcode 漢字", "the red square"]
INSTRUCTION = "Given a claim, find documents that refute the claim"


def query(text: str, instruction: str = plugin.INSTRUCTION) -> str:
    return f"Instruct: {instruction}\nQuery: {text}"


@pytest.fixture
def ask(asks: Callable[[str], Ask]) -> Ask:
    return asks("e5mistral7b_instruct")


@pytest.fixture(scope="module")
def direct() -> Callable[..., Any]:
    """``direct(texts)`` gives what the recipe on the model card gives."""
    folder = checkpoint("e5mistral7b_instruct")
    model = transformers().AutoModel.from_pretrained(folder)
    tokenizer = transformers().AutoTokenizer.from_pretrained(folder)

    def embed(texts: list[str], max_length: int = 4096) -> Any:
        tokens = tokenizer(texts, max_length=max_length, padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            states = model(**tokens).last_hidden_state
            return states[torch.arange(len(texts)), tokens["attention_mask"].sum(dim=1) - 1].numpy()

    return embed


def unit(vectors: Any) -> Any:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_passages_vectors_are_those_of_the_model_card_s_recipe(ask: Ask, direct: Callable[..., Any]) -> None:
    answers = ask("text_embedding", text=TEXTS)

    np.testing.assert_allclose(answers, unit(direct(TEXTS)), atol=1e-4)


def test_query_is_read_after_the_default_instruction(ask: Ask, direct: Callable[..., Any]) -> None:
    answers = ask("text_query_embedding", text=TEXTS)

    np.testing.assert_allclose(answers, unit(direct([query(text) for text in TEXTS])), atol=1e-4)


def test_query_is_read_after_the_request_s_own_instruction(ask: Ask, direct: Callable[..., Any]) -> None:
    answers = ask("text_query_embedding", text=TEXTS, config={"instruction": INSTRUCTION})

    np.testing.assert_allclose(answers, unit(direct([query(text, INSTRUCTION) for text in TEXTS])), atol=1e-4)


@pytest.mark.parametrize("task", ["text_embedding", "text_query_embedding"])
def test_vectors_of_a_batch_are_those_of_its_texts_alone(ask: Ask, task: str) -> None:
    answers = ask(task, text=TEXTS)

    for text, answer in zip(TEXTS, answers, strict=True):
        assert answer == pytest.approx(ask(task, text=text), abs=1e-4)


def test_vector_has_the_model_s_own_length_if_it_is_not_to_be_normalised(ask: Ask, direct: Callable[..., Any]) -> None:
    answer = ask("text_embedding", text="a cat", config={"normalize": False})

    assert answer == pytest.approx(direct(["a cat"])[0], abs=1e-4)
    assert np.linalg.norm(answer) > 1.5


def test_long_text_is_cut_off_and_ended_all_the_same(
    ask: Ask, direct: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "MAX_TOKENS", 40)
    text = "the red square and the blue circle " * 5

    answer = ask("text_embedding", text=text, config={"count_tokens": True})

    assert answer["tokens"] == 40
    np.testing.assert_allclose(answer["embedding"], unit(direct([text], 40))[0], atol=1e-4)


def test_tokenizer_that_does_not_end_texts_gives_the_same_vectors(
    ask: Ask, build: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "MAX_TOKENS", 250)
    texts = [*TEXTS, "the red square " * 20]
    expected = ask("text_embedding", text=texts)
    folder = Path(shutil.copytree(checkpoint("e5mistral7b_instruct"), tmp_path / "checkpoint"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    template = tokenizer["post_processor"]["single"]
    assert template.pop() == {"SpecialToken": {"id": "</s>", "type_id": 0}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    engine = build(E5MISTRAL7B_INSTRUCT_CHECKPOINT=str(folder), DEVICE="cpu")

    answers = Ask(create_app(engine).test_client(), "e5mistral7b_instruct")("text_embedding", text=texts)

    np.testing.assert_allclose(answers, expected, atol=1e-5)


def test_texts_go_through_the_model_by_as_many_tokens_as_memory_allows(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask("text_embedding", text="a cat")
    model, shapes = plugin.model, []
    monkeypatch.setattr(plugin, "TOKENS_A_CALL", 64)

    def record(module: Any, arguments: Any, inputs: dict[str, Any]) -> None:
        shapes.append(tuple(inputs["input_ids"].shape))

    with model.register_forward_pre_hook(record, with_kwargs=True):
        ask("text_embedding", text=["ab" * 10] * 5 + ["ab" * 50])

    assert [n_texts for n_texts, _ in shapes] == [1, 2, 2, 1]


@pytest.mark.parametrize(
    ("task", "config", "field"),
    [
        ("text_query_embedding", {"instruction": ""}, "config.instruction"),
        ("text_query_embedding", {"instruction": "a" * 1001}, "config.instruction"),
        ("text_query_embedding", {"instruction": 5}, "config.instruction"),
        ("text_embedding", {"instruction": "a"}, "config.instruction"),
    ],
    ids=["empty", "too long", "no text", "for a passage"],
)
def test_what_config_may_not_hold_is_named(ask: Ask, task: str, config: dict[str, Any], field: str) -> None:
    response = ask.response(task, text="a cat", config=config)

    assert (response.status_code, response.json["field"]) == (400, field)
