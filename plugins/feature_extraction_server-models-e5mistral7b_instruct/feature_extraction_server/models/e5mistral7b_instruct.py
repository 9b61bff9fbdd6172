"""E5 Mistral 7B instruct: vectors of English texts, by which what a query asks for is found as an instruction says.

Weights: intfloat/e5-mistral-7b-instruct, MIT. Paper: https://arxiv.org/abs/2401.00368
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.config import TextEmbeddingConfig
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.text_encoder import embed_tokens, last_token, tokenize

MAX_TOKENS = 4096
TOKENS_A_CALL = 4096  # the states between the layers take some 100 kB a token
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


class QueryConfig(TextEmbeddingConfig):
    """What a client may ask about a query."""

    instruction: str = Field(INSTRUCTION, min_length=1, max_length=1000)


config_types = {"text_embedding": TextEmbeddingConfig, "text_query_embedding": QueryConfig}

checkpoint: Checkpoint
model: Any
tokenizer: Any


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    checkpoint = Checkpoint(settings_manager, "e5mistral7b_instruct", "intfloat/e5-mistral-7b-instruct")


def load_model() -> None:
    global model, tokenizer
    from transformers import AutoTokenizer, MistralModel

    tokenizer = checkpoint.load_processor(AutoTokenizer)
    model = checkpoint.load_model(MistralModel)
    model.config.use_cache = False  # nothing is generated


def text_embedding(text: list[str], config: dict[str, Any]) -> list[Any]:
    return _embed(text, "", config)


def text_query_embedding(text: list[str], config: dict[str, Any]) -> list[Any]:
    return _embed(text, f"Instruct: {config.get('instruction', INSTRUCTION)}\nQuery: ", config)


def _embed(text: list[str], prefix: str, config: dict[str, Any]) -> list[Any]:
    tokens = tokenize(tokenizer, text, MAX_TOKENS, prefix, end=tokenizer.eos_token_id)
    return embed_tokens(model, tokens, last_token, config, TOKENS_A_CALL)
