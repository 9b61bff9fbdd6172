"""CLIP and its kin, which embed images and texts in one space: what their plugins have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.config import CatalogueConfig, Config, EmbeddingConfig, TextEmbeddingConfig
from feature_extraction_server.core.embeddings import as_vectors, with_token_counts

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

#: How many texts go through the model at once: a catalogue may hold a thousand.
TEXTS_A_CALL: Final = 128
#: Far more than the tokens that a model reads can hold; it saves tokenizing the rest.
MAX_CHARACTERS: Final = 4096

#: ``config_types`` of a plugin.
CONFIG_TYPES: Final[dict[str, type[Config]]] = {
    "image_embedding": EmbeddingConfig,
    "text_embedding": TextEmbeddingConfig,
    "text_query_embedding": TextEmbeddingConfig,
    "zero_shot_image_classification": CatalogueConfig,
}


def image_features(checkpoint: Checkpoint, model: Any, image_processor: Any, images: list[Image]) -> torch.Tensor:
    """Return what a model makes of images, float32 (n_images, n_dimensions).

    Args:
        checkpoint: the model's.
        model: one of transformers' models that have ``get_image_features``.
        image_processor: the model's.
        images: RGB.
    """

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = model.get_image_features(pixel_values=pixels).pooler_output
        return features

    return checkpoint.encode_images(encode, image_processor, images).float()


def text_features(
    model: Any, tokenizer: Any, texts: list[str], *, reads_padding: bool = False, **arguments: Any
) -> tuple[torch.Tensor, list[int]]:
    """Return what a model makes of texts, float32 (n_texts, n_dimensions), and how many tokens it read of each.

    Args:
        model: one of transformers' models that have ``get_text_features``.
        tokenizer: the model's.
        texts: of ``MAX_CHARACTERS`` at most; each is cut off after as many tokens as the model reads.
        reads_padding: whether the model was trained without a mask that keeps padding from it.
        arguments: more arguments of the tokenizer.
    """
    import torch

    tokens = tokenizer(
        texts,
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
        return_attention_mask=True,
        return_tensors="pt",
        **({"padding": True} | arguments),
    ).to(model.device)
    mask = tokens["attention_mask"]
    with torch.inference_mode():
        features = [
            model.get_text_features(
                input_ids=tokens["input_ids"][first : first + TEXTS_A_CALL],
                attention_mask=None if reads_padding else mask[first : first + TEXTS_A_CALL],
            ).pooler_output.float()
            for first in range(0, len(texts), TEXTS_A_CALL)
        ]
        return torch.cat(features), mask.sum(dim=1).tolist()


def embed_texts(model: Any, tokenizer: Any, texts: list[str], config: dict[str, Any], **arguments: Any) -> list[Any]:
    """Return the answer of ``text_embedding``: a float32 (n_dimensions,) vector a text.

    Args:
        texts: each is cut off after as many tokens as the model reads.
        config: the request's, as ``TextEmbeddingConfig`` checked it.
        model, tokenizer, arguments: as of ``text_features``.
    """
    features, n_tokens = text_features(model, tokenizer, [text[:MAX_CHARACTERS] for text in texts], **arguments)
    return with_token_counts(as_vectors(features, config), n_tokens, config)


def embed_classes(
    model: Any, tokenizer: Any, classes: list[str], config: dict[str, Any], **arguments: Any
) -> torch.Tensor:
    """Return the embeddings of classes' names, float32 (n_classes, n_dimensions), L2-normalised.

    Args:
        classes: the names, which the template is put around.
        config: the request's, as ``CatalogueConfig`` checked it.
        model, tokenizer, arguments: as of ``text_features``.
    """
    import torch

    template = config.get("template", "{}")
    sentences = [template.replace("{}", name[:MAX_CHARACTERS]) for name in classes]
    features, _ = text_features(model, tokenizer, sentences, **arguments)
    with torch.inference_mode():
        return torch.nn.functional.normalize(features)


def class_logits(model: Any, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Return how well classes fit images, (n_images, n_classes): cosines, scaled and shifted as the model learned it.

    Args:
        model: one of transformers' models that have a ``logit_scale``, and perhaps a ``logit_bias``.
        images: as ``image_features`` gives them.
        classes: as ``embed_classes`` gives them.
    """
    import torch

    with torch.inference_mode():
        logits: torch.Tensor = torch.nn.functional.normalize(images) @ classes.T * model.logit_scale.float().exp()
        return logits + model.logit_bias.float() if hasattr(model, "logit_bias") else logits
