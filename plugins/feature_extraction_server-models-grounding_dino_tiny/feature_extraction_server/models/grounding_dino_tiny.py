"""Grounding DINO tiny: where objects with given names are in an image.

Weights: IDEA-Research/grounding-dino-tiny, Apache-2.0. Paper: https://arxiv.org/abs/2303.05499
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL.Image import Image
from pydantic import Field

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.detections import DetectionConfig, Detections, Found, detect, of_coco, with_classes
from feature_extraction_server.core.image_text import MAX_CHARACTERS
from feature_extraction_server.core.settings import SettingsManager

if TYPE_CHECKING:
    import torch


class DinoConfig(DetectionConfig):
    """What a client may ask of this model."""

    threshold: float = Field(0.25, ge=0, le=1)


config_types = {"object_detection": with_classes(DinoConfig), "zero_shot_object_detection": DinoConfig}

checkpoint: Checkpoint
model: Any
image_processor: Any
tokenizer: Any


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    checkpoint = Checkpoint(settings_manager, "grounding_dino_tiny", "IDEA-Research/grounding-dino-tiny")


def load_model() -> None:
    global model, image_processor, tokenizer
    from transformers import AutoTokenizer, GroundingDinoForObjectDetection, GroundingDinoImageProcessorPil

    image_processor = checkpoint.load_processor(GroundingDinoImageProcessorPil)
    tokenizer = checkpoint.load_processor(AutoTokenizer)
    model = checkpoint.load_model(GroundingDinoForObjectDetection)


def zero_shot_object_detection(image: list[Image], classes: list[str], config: dict[str, Any]) -> list[Detections]:
    import torch

    prompts = _prompts(classes)

    def find(pixels: torch.Tensor) -> Found:
        each = [_find(pixels, tokens, owners) for tokens, owners in prompts]
        return Found(*(torch.cat(parts, dim=1) for parts in zip(*each, strict=True)))

    return detect(checkpoint, image_processor, image, find, classes, DinoConfig(**config))


object_detection = of_coco(zero_shot_object_detection)


def _find(pixels: torch.Tensor, tokens: torch.Tensor, owners: torch.Tensor) -> Found:
    """Return what is found with one prompt: the score of an object is that of the best token of a class's name."""
    outputs = model(pixel_values=pixels, input_ids=tokens.expand(len(pixels), -1))
    probabilities = outputs.logits[..., : len(owners)].float().sigmoid().masked_fill(owners < 0, 0)
    scores, best = probabilities.max(dim=-1)
    return Found(outputs.pred_boxes, scores, owners[best])


def _prompts(classes: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return classes as the model reads them, ``a cat. a dog.``, in as few prompts as hold them.

    Returns:
        For each prompt its tokens, int (1, n_tokens), and the number of the class that each token belongs to, int
        (n_tokens,), -1 for those that stand between the names.
    """
    import torch

    first, stop, also_stop, last = tokenizer.convert_tokens_to_ids([tokenizer.cls_token, ".", "?", tokenizer.sep_token])
    room = model.config.max_text_len - 2
    names = tokenizer([name[:MAX_CHARACTERS].lower() for name in classes], add_special_tokens=False)["input_ids"]
    prompts: list[tuple[list[int], list[int]]] = [([], [])]
    for number, name in enumerate(names):
        # The model would take a stop within a name for the end of the name.
        words = [token for token in name if token not in (first, stop, also_stop, last)][: room - 1]
        if not words:
            continue
        if len(prompts[-1][0]) + len(words) + 1 > room:
            prompts.append(([], []))
        tokens, owners = prompts[-1]
        tokens += [*words, stop]
        owners += [number] * len(words) + [-1]
    return [
        (
            torch.tensor([[first, *tokens, last]], device=model.device),
            torch.tensor([-1, *owners, -1], device=model.device),
        )
        for tokens, owners in prompts
    ]
