"""OWL-ViT B/32: where objects with given names are in an image.

Weights: google/owlvit-base-patch32, Apache-2.0. Paper: https://arxiv.org/abs/2205.06230
"""

from __future__ import annotations

from typing import Any

from PIL.Image import Image

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.config import CatalogueConfig
from feature_extraction_server.core.detections import COCO_CLASSES, ClassNames, DetectionConfig, Found, select
from feature_extraction_server.core.image_text import embed_classes
from feature_extraction_server.core.settings import SettingsManager


class ZeroShotConfig(DetectionConfig, CatalogueConfig):
    """What a client may ask of this model."""


class CatalogueDetectionConfig(ZeroShotConfig):
    """What a client may ask of this model where the task takes no classes."""

    classes: ClassNames = COCO_CLASSES


config_types = {"object_detection": CatalogueDetectionConfig, "zero_shot_object_detection": ZeroShotConfig}

checkpoint: Checkpoint
model: Any
image_processor: Any
tokenizer: Any


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    checkpoint = Checkpoint(settings_manager, "owlvit_base_patch32", "google/owlvit-base-patch32")


def load_model() -> None:
    global model, image_processor, tokenizer
    from transformers import AutoTokenizer, OwlViTForObjectDetection, OwlViTImageProcessorPil

    image_processor = checkpoint.load_processor(OwlViTImageProcessorPil)
    tokenizer = checkpoint.load_processor(AutoTokenizer)
    model = checkpoint.load_model(OwlViTForObjectDetection)


def object_detection(image: list[Image], config: dict[str, Any]) -> list[dict[str, list[Any]]]:
    return zero_shot_object_detection(image, config.get("classes", COCO_CLASSES), config)


def zero_shot_object_detection(
    image: list[Image], classes: list[str], config: dict[str, Any]
) -> list[dict[str, list[Any]]]:
    import torch

    pixels = checkpoint.pixel_values(image_processor, image)
    with torch.inference_mode():
        # As the model's forward does, but that the names are embedded once and not for every image.
        queries = embed_classes(model.owlvit, tokenizer, classes, config, padding="max_length").to(pixels.dtype)
        feature_map, _ = model.image_embedder(pixels)
        features = feature_map.flatten(1, 2)
        logits, _ = model.class_predictor(features, queries.expand(len(image), -1, -1))
        scores, labels = logits.float().sigmoid().max(dim=-1)
        found = Found(model.box_predictor(features, feature_map), scores, labels)
    return select(found, classes, image, CatalogueDetectionConfig(**config))
