"""OWL-ViT B/32: where objects with given names are in an image.

Weights: google/owlvit-base-patch32, Apache-2.0. Paper: https://arxiv.org/abs/2205.06230
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.config import CatalogueConfig
from feature_extraction_server.core.detections import DetectionConfig, Detections, Found, of_coco, select, with_classes
from feature_extraction_server.core.image_text import class_embedder
from feature_extraction_server.core.settings import SettingsManager

if TYPE_CHECKING:
    import torch


class OwlVitConfig(DetectionConfig, CatalogueConfig):
    """What a client may ask of this model."""


config_types = {"object_detection": with_classes(OwlVitConfig), "zero_shot_object_detection": OwlVitConfig}

checkpoint: Checkpoint
model: Any
image_processor: Any
embed_classes: Callable[[list[str], dict[str, Any]], torch.Tensor]


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    checkpoint = Checkpoint(settings_manager, "owlvit_base_patch32", "google/owlvit-base-patch32")


def load_model() -> None:
    global model, image_processor, embed_classes
    from transformers import AutoTokenizer, OwlViTForObjectDetection, OwlViTImageProcessorPil

    image_processor = checkpoint.load_processor(OwlViTImageProcessorPil)
    tokenizer = checkpoint.load_processor(AutoTokenizer)
    model = checkpoint.load_model(OwlViTForObjectDetection)
    embed_classes = class_embedder(model.owlvit, tokenizer, padding="max_length")


def zero_shot_object_detection(image: list[Image], classes: list[str], config: dict[str, Any]) -> list[Detections]:
    import torch

    pixels = checkpoint.pixel_values(image_processor, image)
    with torch.inference_mode():
        # As the model's forward does, but that the names are embedded once and not for every image.
        queries = embed_classes(classes, config).to(pixels.dtype)
        feature_map, _ = model.image_embedder(pixels)
        features = feature_map.flatten(1, 2)
        logits, _ = model.class_predictor(features, queries.expand(len(image), -1, -1))
        scores, labels = logits.float().sigmoid().max(dim=-1)
        found = Found(model.box_predictor(features, feature_map), scores, labels)
    return select(found, classes, image, OwlVitConfig(**config))


object_detection = of_coco(zero_shot_object_detection)
