"""A ViT encoder with a GPT-2 decoder: captions of images.

Weights: nlpconnect/vit-gpt2-image-captioning, Apache-2.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.config import GenerationConfig
from feature_extraction_server.core.generation import continue_prompts, forget_max_length
from feature_extraction_server.core.settings import SettingsManager

if TYPE_CHECKING:
    import torch

config_types = {"image_captioning": GenerationConfig}
image_sizes = {"image_captioning": 224}

checkpoint: Checkpoint
model: Any
image_processor: Any
tokenizer: Any


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    checkpoint = Checkpoint(settings_manager, "vit_gpt2", "nlpconnect/vit-gpt2-image-captioning")


def load_model() -> None:
    global model, image_processor, tokenizer
    from transformers import AutoTokenizer, VisionEncoderDecoderModel, ViTImageProcessorPil

    image_processor = checkpoint.load_processor(ViTImageProcessorPil)
    tokenizer = checkpoint.load_processor(AutoTokenizer)
    # The decoder attends to all of the encoder's states, not to what a pooler makes of the first.
    model = checkpoint.load_model(VisionEncoderDecoderModel, may_lack=("encoder.pooler.",))
    forget_max_length(model)


def image_captioning(image: list[Image], config: dict[str, Any]) -> list[list[str]]:
    end = tokenizer.eos_token_id  # GPT-2 has one special token for all purposes

    def generate(*, input_ids: torch.Tensor, **arguments: Any) -> Any:
        return model.generate(decoder_input_ids=input_ids, eos_token_id=end, pad_token_id=end, **arguments)

    pixels = checkpoint.pixel_values(image_processor, image)
    return continue_prompts(model, tokenizer, pixels, [[end]] * len(image), config, generate=generate)
