"""CLIP ViT-L/14: vectors of images and of texts that can be compared, and how probable each class is for an image.

Weights: openai/clip-vit-large-patch14, MIT. Paper: https://arxiv.org/abs/2103.00020
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.config import CatalogueConfig, EmbeddingConfig, TextEmbeddingConfig
from feature_extraction_server.core.embeddings import (
    MAX_CHARACTERS,
    as_vectors,
    embed_texts,
    text_features,
    with_token_counts,
)
from feature_extraction_server.core.settings import SettingsManager

if TYPE_CHECKING:
    import torch

config_types = {
    "image_embedding": EmbeddingConfig,
    "text_embedding": TextEmbeddingConfig,
    "text_query_embedding": TextEmbeddingConfig,
    "zero_shot_image_classification": CatalogueConfig,
}
image_sizes = {"image_embedding": 224, "zero_shot_image_classification": 224}

LONGEST_FORM = 8  # how many times longer than wide a picture may be

checkpoint: Checkpoint
model: Any
image_processor: Any
tokenizer: Any


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    checkpoint = Checkpoint(settings_manager, "clip_vit_large_patch14", "openai/clip-vit-large-patch14")


def load_model() -> None:
    global model, image_processor, tokenizer
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    image_processor = checkpoint.load_processor(CLIPImageProcessorPil)
    tokenizer = checkpoint.load_processor(AutoTokenizer)
    model = checkpoint.load_model(CLIPModel)


def image_embedding(image: list[Image.Image], config: dict[str, Any]) -> list[Any]:
    return as_vectors(_image_features(image), config)


def text_embedding(text: list[str], config: dict[str, Any]) -> list[Any]:
    features, n_tokens = text_features(model, tokenizer, [one[:MAX_CHARACTERS] for one in text])
    return with_token_counts(as_vectors(features, config), n_tokens, config)


text_query_embedding = text_embedding  # images and captions are searched with the same vectors


def zero_shot_image_classification(
    image: list[Image.Image], classes: list[str], config: dict[str, Any]
) -> list[list[float]]:
    import torch

    with torch.inference_mode():
        images = torch.nn.functional.normalize(_image_features(image))
        texts = embed_texts(model, tokenizer, classes, config)
        probabilities: list[list[float]] = (images @ texts.T * model.logit_scale.float().exp()).softmax(dim=1).tolist()
    return probabilities


def _image_features(image: list[Image.Image]) -> torch.Tensor:
    """Return the projected features of pictures, float32 (n_pictures, n_dimensions)."""
    import torch

    with torch.inference_mode():
        pixels = checkpoint.pixel_values(image_processor, [_middle(picture) for picture in image])
        features: torch.Tensor = model.get_image_features(pixel_values=pixels).pooler_output.float()
        return features


def _middle(picture: Image.Image) -> Image.Image:
    """Cut a strip of a picture down to its middle.

    The image processor enlarges it until its short side fits, which may take gigabytes, and keeps the middle square.
    """
    longest = LONGEST_FORM * min(picture.size)
    width, height = min(picture.width, longest), min(picture.height, longest)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
