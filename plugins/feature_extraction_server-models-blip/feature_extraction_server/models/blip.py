"""BLIP: captions of images, free or continuing a given text.

Weights: Salesforce/blip-image-captioning-base, BSD-3-Clause. Paper: https://arxiv.org/abs/2201.12086
"""

from __future__ import annotations

from typing import Any

from PIL.Image import Image

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.config import GenerationConfig
from feature_extraction_server.core.generation import continue_prompts, forget_max_length, tokenize
from feature_extraction_server.core.settings import SettingsManager

config_types = {"image_captioning": GenerationConfig, "conditional_image_captioning": GenerationConfig}
image_sizes = {"image_captioning": 384, "conditional_image_captioning": 384}

checkpoint: Checkpoint
model: Any
image_processor: Any
tokenizer: Any


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    checkpoint = Checkpoint(settings_manager, "blip", "Salesforce/blip-image-captioning-base")


def load_model() -> None:
    global model, image_processor, tokenizer
    from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil

    image_processor = checkpoint.load_processor(BlipImageProcessorPil)
    tokenizer = checkpoint.load_processor(AutoTokenizer)
    model = checkpoint.load_model(BlipForConditionalGeneration)
    forget_max_length(model)


def image_captioning(image: list[Image], config: dict[str, Any]) -> list[list[str]]:
    return conditional_image_captioning(image, [""] * len(image), config)


def conditional_image_captioning(image: list[Image], text: list[str], config: dict[str, Any]) -> list[list[str]]:
    import torch

    def generate(*, input_ids: torch.Tensor, **arguments: Any) -> Any:
        # The model's generate cuts off one token more, where the tokenizer puts the text's end.
        return model.generate(input_ids=torch.nn.functional.pad(input_ids, (0, 1)), **arguments)

    pixels = checkpoint.pixel_values(image_processor, image)
    prompts = [tokens[:-1] for tokens in tokenize(tokenizer, text)]
    captions = continue_prompts(model, tokenizer, pixels, prompts, config, generate=generate)
    # A caption that goes on inside the text's last word begins with a WordPiece's mark.
    return [[caption.removeprefix("##") for caption in item] for item in captions]
