"""OpenCLIP ViT-B/32: vectors of images and of texts that can be compared, and how probable each class is for an image.

Weights: laion/CLIP-ViT-B-32-laion2B-s34B-b79K, MIT. Paper: https://arxiv.org/abs/2212.07143
"""

from __future__ import annotations

from typing import Any

from PIL.Image import Image

from feature_extraction_server.core.encoder_backend import EncoderCheckpoint
from feature_extraction_server.core.image_text import CONFIG_TYPES, ImageTextEncoder
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.strips import cut_strips

config_types = CONFIG_TYPES
image_sizes = {"image_embedding": 224, "zero_shot_image_classification": 224}

checkpoint: EncoderCheckpoint
model: Any
encoder: ImageTextEncoder


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    checkpoint = EncoderCheckpoint(settings_manager, "open_clip_vit_b32", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K")


def load_model() -> None:
    global model, encoder
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    image_processor = checkpoint.load_processor(CLIPImageProcessorPil)
    tokenizer = checkpoint.load_processor(AutoTokenizer)
    model = checkpoint.load_model(CLIPModel)
    checkpoint.speed_up(model.text_model, "pooler_output")
    encoder = ImageTextEncoder(checkpoint, model, image_processor, tokenizer)


def image_embedding(image: list[Image], config: dict[str, Any]) -> list[Any]:
    return encoder.embed_images(cut_strips(image), config)


def text_embedding(text: list[str], config: dict[str, Any]) -> list[Any]:
    return encoder.embed_texts(text, config)


text_query_embedding = text_embedding  # images and captions are searched with the same vectors


def zero_shot_image_classification(image: list[Image], classes: list[str], config: dict[str, Any]) -> list[list[float]]:
    probabilities: list[list[float]] = encoder.class_logits(cut_strips(image), classes, config).softmax(dim=1).tolist()
    return probabilities
