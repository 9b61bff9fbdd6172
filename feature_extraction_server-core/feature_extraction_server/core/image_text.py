"""CLIP and its kin, which embed images and texts in one space: what their plugins have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.class_vectors import ClassVectors
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


@dataclass(frozen=True)
class ImageTextEncoder:
    """A loaded model that embeds images and texts in one space.

    Attributes:
        checkpoint: the model's.
        model: one of transformers' models that have ``get_image_features``, ``get_text_features``, a ``logit_scale``,
            and perhaps a ``logit_bias``.
        image_processor: the model's.
        tokenizer: the model's.
        reading: more arguments of ``text_features``.
    """

    checkpoint: Checkpoint
    model: Any
    image_processor: Any
    tokenizer: Any
    reading: dict[str, Any] = field(default_factory=dict)

    def embed_images(self, images: list[Image], config: dict[str, Any]) -> list[Any]:
        """Return the answer of ``image_embedding``: a float32 (n_dimensions,) vector an image.

        Args:
            images: RGB.
            config: the request's, as ``EmbeddingConfig`` checked it.
        """
        return as_vectors(self._image_features(images), config)

    def embed_texts(self, texts: list[str], config: dict[str, Any]) -> list[Any]:
        """Return the answer of ``text_embedding``: a float32 (n_dimensions,) vector a text.

        Args:
            texts: each is cut off after as many tokens as the model reads.
            config: the request's, as ``TextEmbeddingConfig`` checked it.
        """
        texts = [text[:MAX_CHARACTERS] for text in texts]
        features, n_tokens = text_features(self.model, self.tokenizer, texts, **self.reading)
        return with_token_counts(as_vectors(features, config), n_tokens, config)

    def class_logits(self, images: list[Image], classes: list[str], config: dict[str, Any]) -> torch.Tensor:
        """Return how well classes fit images, (n_images, n_classes): cosines, scaled and shifted as the model learned.

        Args:
            images: RGB.
            classes: their names.
            config: the request's, as ``CatalogueConfig`` checked it.
        """
        import torch

        image_features = self._image_features(images)
        class_features = self._embed_classes(classes, config)
        with torch.inference_mode():
            cosines = torch.nn.functional.normalize(image_features) @ class_features.T
            logits: torch.Tensor = cosines * self.model.logit_scale.float().exp()
            return logits + self.model.logit_bias.float() if hasattr(self.model, "logit_bias") else logits

    @cached_property
    def _embed_classes(self) -> Callable[[list[str], dict[str, Any]], torch.Tensor]:
        return class_embedder(self.model, self.tokenizer, **self.reading)

    def _image_features(self, images: list[Image]) -> torch.Tensor:
        def encode(pixels: torch.Tensor) -> torch.Tensor:
            features: torch.Tensor = self.model.get_image_features(pixel_values=pixels).pooler_output
            return features

        return self.checkpoint.encode_images(encode, self.image_processor, images).float()


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


def class_embedder(model: Any, tokenizer: Any, **arguments: Any) -> Callable[[list[str], dict[str, Any]], torch.Tensor]:
    """Return what embeds classes that a client names: a function of ``classes`` and ``config``. For one thread.

    It returns the vectors of the classes' names with the request's template around them, float32 (n_classes,
    n_dimensions), L2-normalised, and remembers them. ``config`` is the request's, as ``CatalogueConfig`` checked it.

    Args:
        model, tokenizer, arguments: as of ``text_features``.
    """

    def embed(sentences: list[str]) -> torch.Tensor:
        import torch

        features, _ = text_features(model, tokenizer, sentences, **arguments)
        with torch.inference_mode():
            return torch.nn.functional.normalize(features)

    vectors = ClassVectors(embed)

    def embed_classes(classes: list[str], config: dict[str, Any]) -> torch.Tensor:
        template = config.get("template", "{}")
        return vectors([template.replace("{}", name[:MAX_CHARACTERS]) for name in classes])

    return embed_classes
