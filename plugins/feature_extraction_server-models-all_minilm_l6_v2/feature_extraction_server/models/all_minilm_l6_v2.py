"""all-MiniLM-L6-v2: vectors of English sentences and short paragraphs, by which texts of like meaning are found.

Weights: sentence-transformers/all-MiniLM-L6-v2, Apache-2.0. Paper: https://arxiv.org/abs/2002.10957 (MiniLM),
https://arxiv.org/abs/1908.10084 (Sentence-BERT)
"""

from __future__ import annotations

from typing import Any

from feature_extraction_server.core.config import TextEmbeddingConfig
from feature_extraction_server.core.encoder_backend import EncoderCheckpoint
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.text_encoder import embed_tokens, mean_of_tokens, tokenize

MAX_TOKENS = 256  # the model was trained on texts cut off there, though it has more positions

config_types = {"text_embedding": TextEmbeddingConfig, "text_query_embedding": TextEmbeddingConfig}

checkpoint: EncoderCheckpoint
model: Any
tokenizer: Any


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    checkpoint = EncoderCheckpoint(settings_manager, "all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2")


def load_model() -> None:
    global model, tokenizer
    from transformers import AutoModel, AutoTokenizer

    tokenizer = checkpoint.load_processor(AutoTokenizer)
    model = checkpoint.load_model(AutoModel, may_lack=("pooler.",))
    checkpoint.speed_up(model, "last_hidden_state")


def text_embedding(text: list[str], config: dict[str, Any]) -> list[Any]:
    return embed_tokens(model, tokenize(tokenizer, text, MAX_TOKENS), mean_of_tokens, config)


text_query_embedding = text_embedding  # the model was trained on pairs of texts, neither of which is a query
