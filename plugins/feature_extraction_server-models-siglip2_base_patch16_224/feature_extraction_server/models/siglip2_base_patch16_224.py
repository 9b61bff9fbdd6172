"""SigLIP 2 base: vectors of images and of texts that can be compared, and how probable each class is for an image.

Weights: google/siglip2-base-patch16-224, Apache-2.0. Paper: https://arxiv.org/abs/2502.14786
"""

from __future__ import annotations

from typing import Any, Final

from PIL.Image import Image

from feature_extraction_server.core.encoder_backend import EncoderCheckpoint
from feature_extraction_server.core.image_text import CONFIG_TYPES, ImageTextEncoder
from feature_extraction_server.core.settings import SettingsManager

config_types = CONFIG_TYPES
image_sizes = {"image_embedding": 224, "zero_shot_image_classification": 224}

#: How the model was trained to read texts: always padded to 64 tokens, and looking at the padding as well.
READING: Final[dict[str, Any]] = {"padding": "max_length", "padding_side": "right", "reads_padding": True}

checkpoint: EncoderCheckpoint
model: Any
encoder: ImageTextEncoder


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    checkpoint = EncoderCheckpoint(settings_manager, "siglip2_base_patch16_224", "google/siglip2-base-patch16-224")


def load_model() -> None:
    global model, encoder
    from transformers import Siglip2Tokenizer, SiglipImageProcessorPil, SiglipModel

    image_processor = checkpoint.load_processor(SiglipImageProcessorPil)
    tokenizer = checkpoint.load_processor(Siglip2Tokenizer)  # the class that the checkpoint names keeps capitals
    model = checkpoint.load_model(SiglipModel)
    checkpoint.speed_up(model.text_model, "pooler_output")
    encoder = ImageTextEncoder(checkpoint, model, image_processor, tokenizer, READING)


def image_embedding(image: list[Image], config: dict[str, Any]) -> list[Any]:
    return encoder.embed_images(image, config)


def text_embedding(text: list[str], config: dict[str, Any]) -> list[Any]:
    return encoder.embed_texts(text, config)


text_query_embedding = text_embedding  # images and captions are searched with the same vectors


def zero_shot_image_classification(image: list[Image], classes: list[str], config: dict[str, Any]) -> list[list[float]]:
    probabilities: list[list[float]] = encoder.class_logits(image, classes, config).sigmoid().tolist()
    return probabilities
