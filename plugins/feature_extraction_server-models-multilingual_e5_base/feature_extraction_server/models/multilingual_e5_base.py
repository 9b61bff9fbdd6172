"""Multilingual E5 base: vectors of texts in about 100 languages, by which passages that answer a query are found.

Weights: intfloat/multilingual-e5-base, MIT. Paper: https://arxiv.org/abs/2402.05672
"""

from __future__ import annotations

from typing import Any

from feature_extraction_server.core.config import TextEmbeddingConfig
from feature_extraction_server.core.encoder_backend import EncoderCheckpoint
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.text_encoder import embed_tokens, mean_of_tokens, tokenize

MAX_TOKENS = 512

config_types = {"text_embedding": TextEmbeddingConfig, "text_query_embedding": TextEmbeddingConfig}

checkpoint: EncoderCheckpoint
model: Any
tokenizer: Any


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    checkpoint = EncoderCheckpoint(settings_manager, "multilingual_e5_base", "intfloat/multilingual-e5-base")


def load_model() -> None:
    global model, tokenizer
    from transformers import AutoTokenizer, XLMRobertaModel

    tokenizer = checkpoint.load_processor(AutoTokenizer)
    model = checkpoint.load_model(XLMRobertaModel, add_pooling_layer=False)
    checkpoint.speed_up(model, "last_hidden_state")


def text_embedding(text: list[str], config: dict[str, Any]) -> list[Any]:
    return embed_tokens(model, tokenize(tokenizer, text, MAX_TOKENS, "passage: "), mean_of_tokens, config)


def text_query_embedding(text: list[str], config: dict[str, Any]) -> list[Any]:
    return embed_tokens(model, tokenize(tokenizer, text, MAX_TOKENS, "query: "), mean_of_tokens, config)
