"""A model whose vectors begin with how many characters a text has, and may be cut short."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from feature_extraction_server.core.config import TextEmbeddingConfig

N_DIMENSIONS = 8


class VectorsConfig(TextEmbeddingConfig):
    dimensions: int = Field(N_DIMENSIONS, ge=1, le=N_DIMENSIONS)


config_types = {"text_embedding": VectorsConfig}


def load_model() -> None:
    pass


def text_embedding(text: list[str], config: dict[str, Any]) -> list[Any]:
    vectors = [[float(len(one)), *[0.5] * (config.get("dimensions", N_DIMENSIONS) - 1)] for one in text]
    if not config.get("count_tokens"):
        return vectors
    return [{"embedding": vector, "tokens": len(one.split())} for vector, one in zip(vectors, text, strict=True)]
