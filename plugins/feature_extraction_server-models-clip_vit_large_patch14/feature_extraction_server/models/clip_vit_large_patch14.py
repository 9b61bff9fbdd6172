"""CLIP ViT-L/14: vectors of images and of texts that can be compared, and how probable each class is for an image.

Weights: openai/clip-vit-large-patch14, MIT. Paper: https://arxiv.org/abs/2103.00020
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image

from feature_extraction_server.core.embeddings import as_vectors, cut_strips
from feature_extraction_server.core.encoder_backend import EncoderCheckpoint
from feature_extraction_server.core.image_text import (
    CONFIG_TYPES,
    class_logits,
    embed_classes,
    embed_texts,
    image_features,
)
from feature_extraction_server.core.settings import SettingsManager

if TYPE_CHECKING:
    import torch

config_types = CONFIG_TYPES
image_sizes = {"image_embedding": 224, "zero_shot_image_classification": 224}

checkpoint: EncoderCheckpoint
model: Any
image_processor: Any
tokenizer: Any


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    checkpoint = EncoderCheckpoint(settings_manager, "clip_vit_large_patch14", "openai/clip-vit-large-patch14")


def load_model() -> None:
    global model, image_processor, tokenizer
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    image_processor = checkpoint.load_processor(CLIPImageProcessorPil)
    tokenizer = checkpoint.load_processor(AutoTokenizer)
    model = checkpoint.load_model(CLIPModel)
    checkpoint.speed_up(model.text_model, "pooler_output")


def image_embedding(image: list[Image.Image], config: dict[str, Any]) -> list[Any]:
    return as_vectors(_image_features(image), config)


def text_embedding(text: list[str], config: dict[str, Any]) -> list[Any]:
    return embed_texts(model, tokenizer, text, config)


text_query_embedding = text_embedding  # images and captions are searched with the same vectors


def zero_shot_image_classification(
    image: list[Image.Image], classes: list[str], config: dict[str, Any]
) -> list[list[float]]:
    logits = class_logits(model, _image_features(image), embed_classes(model, tokenizer, classes, config))
    probabilities: list[list[float]] = logits.softmax(dim=1).tolist()
    return probabilities


def _image_features(image: list[Image.Image]) -> torch.Tensor:
    return image_features(checkpoint, model, image_processor, cut_strips(image))
