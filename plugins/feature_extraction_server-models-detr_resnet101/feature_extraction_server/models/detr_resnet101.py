"""DETR with a ResNet-101: where objects of the 80 COCO classes are in an image.

Weights: facebook/detr-resnet-101, Apache-2.0. Paper: https://arxiv.org/abs/2005.12872
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL.Image import Image
from pydantic import Field

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.detections import DetectionConfig, Detections, Found, detect
from feature_extraction_server.core.settings import SettingsManager

if TYPE_CHECKING:
    import torch


class DetrConfig(DetectionConfig):
    """What a client may ask of this model."""

    threshold: float = Field(0.5, ge=0, le=1)


config_types = {"object_detection": DetrConfig}

checkpoint: Checkpoint
model: Any
image_processor: Any


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    # The main revision's backbone is one of the library timm, which needs torchvision; this one's is transformers' own.
    checkpoint = Checkpoint(settings_manager, "detr_resnet101", "facebook/detr-resnet-101", revision="no_timm")


def load_model() -> None:
    global model, image_processor
    from transformers import DetrForObjectDetection, DetrImageProcessorPil

    image_processor = checkpoint.load_processor(DetrImageProcessorPil)
    model = checkpoint.load_model(DetrForObjectDetection)


def object_detection(image: list[Image], config: dict[str, Any]) -> list[Detections]:
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    return detect(checkpoint, image_processor, image, _find, names, DetrConfig(**config))


def _find(pixels: torch.Tensor) -> Found:
    outputs = model(pixel_values=pixels)
    probabilities = outputs.logits.float().softmax(dim=-1)[..., :-1]  # the last class is "no object"
    scores, labels = probabilities.max(dim=-1)
    return Found(outputs.pred_boxes, scores, labels)
