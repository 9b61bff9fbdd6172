"""CLIP ViT-L/14: how probable each class of a catalogue is for an image.

Weights: openai/clip-vit-large-patch14, MIT. Paper: https://arxiv.org/abs/2103.00020
"""

from __future__ import annotations

from typing import Any

from PIL import Image

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.config import CatalogueConfig
from feature_extraction_server.core.embeddings import embed_texts
from feature_extraction_server.core.settings import SettingsManager

config_types = {"zero_shot_image_classification": CatalogueConfig}

LONGEST_FORM = 8  # how many times longer than wide a picture may be

checkpoint: Checkpoint
model: Any
image_processor: Any
tokenizer: Any


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    checkpoint = Checkpoint(settings_manager, "clip_vit_large_patch14", "openai/clip-vit-large-patch14")


def load_model() -> None:
    global model, image_processor, tokenizer
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    image_processor = checkpoint.load_processor(CLIPImageProcessorPil)
    tokenizer = checkpoint.load_processor(AutoTokenizer)
    model = checkpoint.load_model(CLIPModel)


def zero_shot_image_classification(
    image: list[Image.Image], classes: list[str], config: dict[str, Any]
) -> list[list[float]]:
    import torch

    with torch.inference_mode():
        pixels = checkpoint.pixel_values(image_processor, [_middle(picture) for picture in image])
        images = torch.nn.functional.normalize(model.get_image_features(pixel_values=pixels).pooler_output.float())
        texts = embed_texts(model, tokenizer, classes, config)
        probabilities: list[list[float]] = (images @ texts.T * model.logit_scale.float().exp()).softmax(dim=1).tolist()
    return probabilities


def _middle(picture: Image.Image) -> Image.Image:
    """Cut a strip of a picture down to its middle.

    The image processor enlarges it until its short side fits, which may take gigabytes, and keeps the middle square.
    """
    longest = LONGEST_FORM * min(picture.size)
    width, height = min(picture.width, longest), min(picture.height, longest)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
