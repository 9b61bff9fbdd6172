"""BLIP-2 with an OPT language model: captions of images and answers to questions about them.

Weights: Salesforce/blip2-opt-2.7b, MIT, on top of OPT's weights, which are licensed for research only.
Paper: https://arxiv.org/abs/2301.12597
"""

from __future__ import annotations

from typing import Any

from PIL.Image import Image

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.config import GenerationConfig
from feature_extraction_server.core.errors import ModelLoadFailed
from feature_extraction_server.core.generation import continue_prompts, forget_max_length, tokenize
from feature_extraction_server.core.settings import SettingsManager

config_types = {"image_captioning": GenerationConfig, "conditional_image_captioning": GenerationConfig}
image_sizes = {"image_captioning": 224, "conditional_image_captioning": 224}

checkpoint: Checkpoint
model: Any
image_processor: Any
tokenizer: Any


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    checkpoint = Checkpoint(settings_manager, "blip2", "Salesforce/blip2-opt-2.7b")


def load_model() -> None:
    global model, image_processor, tokenizer
    from transformers import AutoTokenizer, Blip2ForConditionalGeneration, BlipImageProcessorPil

    image_processor = checkpoint.load_processor(BlipImageProcessorPil)
    tokenizer = checkpoint.load_processor(AutoTokenizer)
    model = checkpoint.load_model(Blip2ForConditionalGeneration)
    forget_max_length(model)
    if model.config.text_config.is_encoder_decoder:
        raise ModelLoadFailed("BLIP2_CHECKPOINT: the model blip2 takes checkpoints whose language model is OPT")
    if model.config.image_token_index is None:
        # Saved before the image had a token. The number that is free next has a row among the embeddings' padding.
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        model.config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")


def image_captioning(image: list[Image], config: dict[str, Any]) -> list[list[str]]:
    return conditional_image_captioning(image, [""] * len(image), config)


def conditional_image_captioning(image: list[Image], text: list[str], config: dict[str, Any]) -> list[list[str]]:
    pixels = checkpoint.pixel_values(image_processor, image)
    image_tokens = [model.config.image_token_index] * model.config.num_query_tokens
    # Split, a text that spells a special token stays a text: a further <image> would crash the model.
    prompts = [image_tokens + tokens for tokens in tokenize(tokenizer, text, split_special_tokens=True)]
    return continue_prompts(model, tokenizer, pixels, prompts, config, n_image_tokens=len(image_tokens))
