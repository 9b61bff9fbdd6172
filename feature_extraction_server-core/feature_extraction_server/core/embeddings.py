"""Embeddings as models of transformers give them: the vectors of an answer, and texts compared with images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from typing_extensions import TypedDict

from feature_extraction_server.core.task import FiniteFloat

if TYPE_CHECKING:
    import torch

#: How many texts go through the model at once: a catalogue may hold a thousand.
TEXTS_A_CALL: Final = 128
#: Far more than the tokens that a model reads can hold; it saves tokenizing the rest.
MAX_CHARACTERS: Final = 4096


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


def text_features(model: Any, tokenizer: Any, texts: list[str], **arguments: Any) -> tuple[torch.Tensor, list[int]]:
    """Return what a model makes of texts, float32 (n_texts, n_dimensions), and how many tokens it read of each.

    Args:
        model: one of transformers' models that have ``get_text_features``.
        tokenizer: the model's.
        texts: of ``MAX_CHARACTERS`` at most; each is cut off at as many tokens as the model reads.
        arguments: more arguments of the tokenizer.
    """
    import torch

    tokens = tokenizer(
        texts,
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
        return_tensors="pt",
        **({"padding": True} | arguments),
    )
    with torch.inference_mode():
        features = [
            model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output.float()
            for input_ids, attention_mask in zip(
                tokens["input_ids"].to(model.device).split(TEXTS_A_CALL),
                tokens["attention_mask"].to(model.device).split(TEXTS_A_CALL),
                strict=True,
            )
        ]
        return torch.cat(features), tokens["attention_mask"].sum(dim=1).tolist()


def embed_texts(
    model: Any, tokenizer: Any, classes: list[str], config: dict[str, Any], **arguments: Any
) -> torch.Tensor:
    """Return the embeddings of classes' names, float32 (n_classes, n_dimensions), L2-normalised.

    Args:
        model: one of transformers' models that have ``get_text_features``.
        tokenizer: the model's.
        classes: the names; each is cut off at as many tokens as the model reads.
        config: the request's, as ``CatalogueConfig`` checked it.
        arguments: more arguments of the tokenizer.
    """
    import torch

    template = config.get("template", "{}")
    sentences = [template.replace("{}", name[:MAX_CHARACTERS]) for name in classes]
    features, _ = text_features(model, tokenizer, sentences, **arguments)
    with torch.inference_mode():
        return torch.nn.functional.normalize(features)
