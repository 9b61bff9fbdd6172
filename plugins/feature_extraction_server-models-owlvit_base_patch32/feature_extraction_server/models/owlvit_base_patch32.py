"""OWL-ViT B/32: where objects with given names are in an image.

Weights: google/owlvit-base-patch32, Apache-2.0. Paper: https://arxiv.org/abs/2205.06230
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from PIL.Image import Image
from pydantic import Field

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.config import CatalogueConfig
from feature_extraction_server.core.embeddings import embed_texts
from feature_extraction_server.core.settings import SettingsManager

if TYPE_CHECKING:
    import torch

COCO_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
COCO_CLASSES = COCO_NAMES.split(",")


class DetectionConfig(CatalogueConfig):
    """What a client may ask of this model."""

    classes: Annotated[list[str], Field(min_length=1, max_length=1024)] = COCO_CLASSES
    threshold: float = Field(0.1, ge=0, le=1)
    nms_threshold: float = Field(1, ge=0, le=1)
    max_detections: int | None = Field(None, ge=1)


config_types = {"object_detection": DetectionConfig}

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
    import torch

    classes = config.get("classes", COCO_CLASSES)
    pixels = checkpoint.pixel_values(image_processor, image)
    with torch.inference_mode():
        # As the model's forward does, but that the names are embedded once and not for every image.
        queries = embed_texts(model.owlvit, tokenizer, classes, config, padding="max_length").to(pixels.dtype)
        feature_map, _ = model.image_embedder(pixels)
        features = feature_map.flatten(1, 2)
        logits, _ = model.class_predictor(features, queries.expand(len(image), -1, -1))
        centres, extents = model.box_predictor(features, feature_map).float().split(2, dim=-1)
        relative = torch.cat([centres - extents / 2, centres + extents / 2], dim=-1).clamp(0, 1)
        scores, labels = logits.float().sigmoid().max(dim=-1)
        sizes = torch.tensor([[picture.width, picture.height] * 2 for picture in image], device=relative.device)
        boxes = relative * sizes[:, None]
    found = zip(boxes.cpu(), scores.cpu(), labels.cpu(), strict=True)
    return [_select(*one, classes, config) for one in found]


def _select(
    boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, classes: list[str], config: dict[str, Any]
) -> dict[str, list[Any]]:
    """Return one image's detections, best first."""
    best = scores.argsort(descending=True, stable=True)
    chosen = best[scores[best] > config.get("threshold", 0.1)]
    if config.get("nms_threshold", 1) < 1:
        chosen = _suppress(chosen, boxes, labels, config["nms_threshold"])
    chosen = chosen[: config.get("max_detections")]
    names = [classes[label] for label in labels[chosen].tolist()]
    return {"boxes": boxes[chosen].tolist(), "labels": names, "scores": scores[chosen].tolist()}


def _suppress(best: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, threshold: float) -> torch.Tensor:
    """Drop what overlaps a better box of its own class by more than ``threshold`` (intersection over union)."""
    kept = []
    while len(best):
        first, rest = best[0], best[1:]
        kept.append(first)
        inner = (boxes[rest, 2:].minimum(boxes[first, 2:]) - boxes[rest, :2].maximum(boxes[first, :2])).clamp(min=0)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        intersection = inner.prod(dim=1)
        overlap = intersection / (area[rest] + area[first] - intersection).clamp(min=1e-9)
        best = rest[(overlap <= threshold) | (labels[rest] != labels[first])]
    return best.new_tensor([int(index) for index in kept])
