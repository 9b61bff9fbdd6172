"""ViT B/16: which of the 1000 ImageNet classes an image shows.

Weights: google/vit-base-patch16-224, Apache-2.0. Paper: https://arxiv.org/abs/2010.11929
"""

from __future__ import annotations

from typing import Any

from PIL.Image import Image

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.config import DEFAULT_TOP_K, ClassificationConfig
from feature_extraction_server.core.settings import SettingsManager

config_types = {"image_classification": ClassificationConfig}
image_sizes = {"image_classification": 224}

checkpoint: Checkpoint
model: Any
image_processor: Any


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    checkpoint = Checkpoint(settings_manager, "vit_base_patch16_224", "google/vit-base-patch16-224")


def load_model() -> None:
    global model, image_processor
    from transformers import ViTForImageClassification, ViTImageProcessorPil

    image_processor = checkpoint.load_processor(ViTImageProcessorPil)
    model = checkpoint.load_model(ViTForImageClassification)


def image_classification(image: list[Image], config: dict[str, Any]) -> list[dict[str, list[Any]]]:
    names = model.config.id2label
    logits = checkpoint.encode_images(lambda pixels: model(pixel_values=pixels).logits, image_processor, image)
    best = logits.float().softmax(dim=-1).topk(min(config.get("top_k", DEFAULT_TOP_K), len(names)))
    return [
        {"labels": [names[index] for index in indices], "scores": scores}
        for indices, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
