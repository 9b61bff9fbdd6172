"""Embeddings: the vectors of an answer, and how pictures are made fit for a model that looks at their middle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from typing_extensions import TypedDict

from feature_extraction_server.core.task import FiniteFloat

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

#: How many times longer than wide a picture may be.
LONGEST_FORM: Final = 8


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


def cut_strips(images: list[Image]) -> list[Image]:
    """Cut pictures that are far longer than wide, or the other way, down to their middle.

    For image processors that enlarge a picture until its short side fits, which may take gigabytes, and keep the middle
    square.
    """
    return [image if max(image.size) <= LONGEST_FORM * min(image.size) else _middle(image) for image in images]


def _middle(image: Image) -> Image:
    longest = LONGEST_FORM * min(image.size)
    width, height = min(image.width, longest), min(image.height, longest)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
