"""DINOv2 ViT-S/14: vectors of images, by which images that look alike are found.

Weights: facebook/dinov2-small, Apache-2.0. Paper: https://arxiv.org/abs/2304.07193
"""

from __future__ import annotations

from typing import Any

from PIL import Image

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.config import EmbeddingConfig
from feature_extraction_server.core.embeddings import as_vectors
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.strips import cut_strips

config_types = {"image_embedding": EmbeddingConfig}
image_sizes = {"image_embedding": 256}

checkpoint: Checkpoint
model: Any
image_processor: Any


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    checkpoint = Checkpoint(settings_manager, "dino_v2_vits14", "facebook/dinov2-small")


def load_model() -> None:
    global model, image_processor
    from transformers import BitImageProcessorPil, Dinov2Model

    image_processor = checkpoint.load_processor(BitImageProcessorPil)
    model = checkpoint.load_model(Dinov2Model)


def image_embedding(image: list[Image.Image], config: dict[str, Any]) -> list[Any]:
    # The state of the token that stands for the whole image, after the last layer norm.
    states = checkpoint.encode_images(
        lambda pixels: model(pixel_values=pixels).pooler_output, image_processor, cut_strips(image)
    )
    return as_vectors(states, config)
