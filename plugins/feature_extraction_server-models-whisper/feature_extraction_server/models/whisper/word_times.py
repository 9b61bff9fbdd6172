"""When words are spoken: some of the attention heads of Whisper's decoder follow the sound of each token.

After OpenAI's own way of doing it (https://github.com/openai/whisper, ``whisper/timing.py``, MIT).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from feature_extraction_server.core.speech import SAMPLING_RATE

if TYPE_CHECKING:
    import torch

#: How many samples a position of the encoder stands for.
POSITION: Final = SAMPLING_RATE // 50


def spoken_words(
    model: Any,
    tokenizer: Any,
    tokens: list[int],
    sound: torch.Tensor,
    n_samples: int,
    language: str | None,
    task: str,
) -> Iterator[tuple[float, float, str]]:
    """Put a window's tokens together to words.

    Args:
        model: transformers' Whisper, with ``alignment_heads``.
        tokenizer: the model's.
        tokens: what the model wrote, special ones included.
        sound: the window's features, (1, n_mels, n_frames).
        n_samples: how long the window is without its padding.
        language: the code of the spoken one; None if the model knows English only.
        task: ``transcribe`` or ``translate``.

    Yields:
        When a word begins and ends, in seconds from the window's beginning, and the word.
    """
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, _combine_tokens_into_words

    spoken = [token for token in tokens if token < tokenizer.eos_token_id]  # no timestamps
    if not spoken:
        return
    prompt = _prompt(model.generation_config, language, task)
    times = _token_times(model, prompt, spoken, sound, max(1, n_samples // POSITION))
    written = "en" if language is None or task == "translate" else language
    words, _, places = _combine_tokens_into_words(tokenizer, spoken, LANGUAGES.get(written))
    for word, place in zip(words, places, strict=True):
        # A full stop takes as long as the silence that follows.
        sounds = [index for index in place if not _is_punctuation(tokenizer, spoken[index])] or place
        yield times[place[0]], times[sounds[-1] + 1], word


def _is_punctuation(tokenizer: Any, token: int) -> bool:
    text = tokenizer.decode([token])
    return not any(letter.isalnum() or letter == "\N{REPLACEMENT CHARACTER}" for letter in text)  # half a letter


def _prompt(generation: Any, language: str | None, task: str) -> list[int]:
    """Return the tokens that tell the decoder what to write: words without timestamps."""
    tokens = [generation.decoder_start_token_id]
    if language is not None:
        tokens += [generation.lang_to_id[f"<|{language}|>"], generation.task_to_id[task]]
    return [*tokens, generation.no_timestamps_token_id]


def _token_times(
    model: Any, prompt: list[int], tokens: list[int], sound: torch.Tensor, n_positions: int
) -> list[float]:
    """Return when each token begins and, at last, when the last one ends, in seconds from the window's beginning.

    With each token some of the decoder's attention heads follow the sound of the next one. Dynamic time warping finds
    the way on which all tokens together get most of their attention.
    """
    import numpy as np
    from transformers.models.whisper.generation_whisper import _dynamic_time_warping, _median_filter

    fitting = tokens[: model.config.max_target_positions - len(prompt)]
    attention = _attention(model, [*prompt, *fitting], sound)[..., :n_positions]
    attention = (attention - attention.mean(dim=1, keepdim=True)) / (attention.std(dim=1, keepdim=True) + 1e-9)
    likeness = _median_filter(attention, model.config.median_filter_width).mean(dim=0)[len(prompt) - 1 :]
    rows, columns = _dynamic_time_warping(-likeness.double().cpu().numpy())
    begins = columns[np.flatnonzero(np.diff(rows, prepend=-1))] * (POSITION / SAMPLING_RATE)
    times: list[float] = begins.tolist()
    return times + times[-1:] * (len(tokens) - len(fitting))


def _attention(model: Any, tokens: list[int], sound: torch.Tensor) -> torch.Tensor:
    """Return how much of each alignment head's attention goes where with each token, (n_heads, n_tokens, 1500)."""
    import torch

    layers: dict[int, list[int]] = {}
    for layer, head in model.generation_config.alignment_heads:
        layers.setdefault(layer, []).append(head)
    states = model.get_encoder()(sound).last_hidden_state
    kept: list[torch.Tensor] = []
    hooks = [
        model.get_decoder()
        .layers[layer]
        .encoder_attn.register_forward_hook(
            lambda _module, _inputs, output, heads=tuple(heads): kept.append(output[1][0, heads].float())
        )
        for layer, heads in layers.items()
    ]
    implementation = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")  # the others do not tell their weights
        model.get_decoder()(input_ids=torch.tensor([tokens], device=model.device), encoder_hidden_states=states)
    finally:
        model.set_attn_implementation(implementation)
        for hook in hooks:
            hook.remove()
    return torch.cat(kept)
