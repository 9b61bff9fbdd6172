"""Embeddings: the vectors of an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from feature_extraction_server.core.task import FiniteFloat

if TYPE_CHECKING:
    import torch


class CountedEmbedding(TypedDict):
    """A text's vector, and how many tokens the model read of the text."""

    embedding: list[FiniteFloat]
    tokens: int


#: What the tasks that embed texts answer for one text: the bare vector, unless ``config.count_tokens`` is true.
TextEmbedding = list[FiniteFloat] | CountedEmbedding


def as_vectors(embeddings: torch.Tensor, config: dict[str, Any]) -> list[Any]:
    """Return embeddings as one vector an item, float32 (n_dimensions,), of length 1 unless ``config`` says otherwise.

    Args:
        embeddings: as the model gives them, (n_items, n_dimensions).
        config: the request's, as ``EmbeddingConfig`` checked it.
    """
    import torch

    embeddings = embeddings.float()
    if config.get("normalize", True):
        embeddings = torch.nn.functional.normalize(embeddings)
    return list(embeddings.cpu().numpy())


def with_token_counts(vectors: list[Any], n_tokens: list[int], config: dict[str, Any]) -> list[Any]:
    """Return texts' vectors, with the number of tokens that were read for each if ``config`` asks for it."""
    if not config.get("count_tokens", False):
        return vectors
    return [{"embedding": vector, "tokens": n} for vector, n in zip(vectors, n_tokens, strict=True)]
