"""Captions from transformers' models that generate text: how long they get, and how prompts of a batch go together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from feature_extraction_server.core.errors import InvalidInput

if TYPE_CHECKING:
    import torch

#: A caption's length in tokens unless the request says otherwise; transformers' own 20 would cut captions.
DEFAULT_NEW_TOKENS: Final = 50

#: A prompt with more characters is refused before it is tokenized, which takes seconds a megabyte.
MAX_CHARACTERS: Final = 100_000


def forget_max_length(model: Any) -> None:
    """Drop the checkpoint's own ``max_length``, about which transformers would log a warning at every request."""
    for module in model.modules():
        if getattr(module, "generation_config", None) is not None:
            module.generation_config.max_length = None


def tokenize(tokenizer: Any, texts: list[str], **arguments: Any) -> list[list[int]]:
    """Return the tokens of each text.

    Raises:
        InvalidInput: a text is far too long for any model.
    """
    if max(map(len, texts)) > MAX_CHARACTERS:
        raise InvalidInput(f"text is too long: at most {MAX_CHARACTERS} characters are allowed", field="text")
    tokens: list[list[int]] = tokenizer(texts, **arguments).input_ids
    return tokens


def continue_prompts(
    model: Any,
    tokenizer: Any,
    pixels: torch.Tensor,
    prompts: list[list[int]],
    config: dict[str, Any],
    *,
    generate: Callable[..., Any] | None = None,
    n_image_tokens: int = 0,
) -> list[list[str]]:
    """Return ``num_return_sequences`` stripped texts for every prompt, the prompts themselves not included.

    Prompts of one length are run together, those of different lengths apart: a padded prompt would not be answered as
    it is alone (BLIP counts positions from the padding), nor could ``max_length`` mean the same for all.

    Args:
        model: one of transformers' models that write about images.
        tokenizer: turns tokens into text.
        pixels: of the images, (n_images, 3, height, width), where the model is.
        prompts: the tokens that the model is given for each image, image tokens first.
        config: the request's, as ``GenerationConfig`` checked it.
        generate: what to call with ``pixel_values``, ``input_ids`` of equal length, int64 (n_images, n_tokens), and
            more arguments of the generation, if the model's ``generate`` takes others.
        n_image_tokens: how many of a prompt's tokens stand for the image; ``max_length`` does not count them.

    Raises:
        InvalidInput: a prompt is too long.
    """
    import torch

    generate = generate or model.generate
    n_positions = model.config.get_text_config(decoder=True).max_position_embeddings
    captions: list[list[str]] = [[]] * len(prompts)
    for length in sorted({len(prompt) for prompt in prompts}):
        arguments = generation_arguments(config, length - n_image_tokens, n_positions - n_image_tokens)
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        with torch.inference_mode():
            alike = torch.tensor([prompts[row] for row in rows], device=pixels.device)
            tokens = generate(pixel_values=pixels[rows], input_ids=alike, **arguments)
        texts = tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)
        n = len(texts) // len(rows)
        for index, row in enumerate(rows):
            captions[row] = [text.strip() for text in texts[index * n : (index + 1) * n]]
    return captions


def generation_arguments(config: dict[str, Any], n_prompt: int, n_positions: int) -> dict[str, Any]:
    """Return transformers' arguments for a prompt of ``n_prompt`` tokens, all lengths as numbers of new tokens.

    Raises:
        InvalidInput: the prompt leaves no room for new tokens.
    """
    arguments = dict(config)
    longest, shortest = arguments.pop("max_length", None), arguments.pop("min_length", 0)
    fewest = arguments.pop("min_new_tokens", max(0, shortest - n_prompt))
    most = arguments.pop("max_new_tokens", max(DEFAULT_NEW_TOKENS, fewest) if longest is None else longest - n_prompt)
    if n_prompt >= n_positions:
        raise InvalidInput(
            f"text is too long: it has {n_prompt} tokens, and the model takes at most {n_positions - 1}", field="text"
        )
    if most < 1:
        raise InvalidInput(
            f"config.max_length: {longest} leaves no room for a caption, since the text has {n_prompt} tokens already",
            field="config.max_length",
        )
    most = min(most, n_positions - n_prompt)
    arguments["max_new_tokens"] = most
    if fewest:
        arguments["min_new_tokens"] = min(fewest, most)
    return arguments
