"""Whisper: the words that are spoken in recordings of any length.

A recording is cut into windows of at most 30 s, which is what the model hears at once, where it is quietest. Windows go
through the model in batches of a fixed size, whichever recordings they belong to, so that memory stays bounded.

Weights: openai/whisper-base, Apache-2.0 (OpenAI's own release: MIT). Paper: https://arxiv.org/abs/2212.04356
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.config import Config
from feature_extraction_server.core.errors import InvalidInput
from feature_extraction_server.core.media import Audio
from feature_extraction_server.core.settings import SettingsManager

if TYPE_CHECKING:
    import numpy as np
    import torch

    Samples = np.ndarray[Any, np.dtype[np.float32]]
    TimedText = dict[str, Any]

SAMPLING_RATE = 16_000
WINDOW = 30 * SAMPLING_RATE
CUT_WITHIN = 10 * SAMPLING_RATE  # a window is cut somewhere in its last 10 s
FRAME = SAMPLING_RATE // 50  # also what one position of the encoder stands for
SMOOTHED_FRAMES = 15  # loudness is measured over 0.3 s
WINDOWS_A_CALL = 8
# Given silence, the model makes words up.
SHORTEST = SAMPLING_RATE // 10
FAINTEST = 1e-3


class TranscriptionConfig(Config):
    """What a client may ask of this model."""

    language: str | None = Field(None, max_length=40)
    task: Literal["transcribe", "translate"] = "transcribe"
    timestamps: Literal["segments", "words"] | None = None
    num_beams: int = Field(1, ge=1, le=16)
    temperature: float | None = Field(None, gt=0, le=1)
    max_new_tokens: int | None = Field(None, ge=1, le=440)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    no_repeat_ngram_size: int | None = Field(None, ge=0, le=100)


config_types = {"automated_speech_recognition": TranscriptionConfig}

checkpoint: Checkpoint
model: Any
processor: Any


@dataclass
class Window:
    """A part of a recording: whose it is, where it begins in seconds, its samples at 16 kHz, whether there are others.

    And what is said in it: in which language, and in which segments and words if their times are asked for.
    """

    recording: int
    start: float
    samples: Samples
    is_part: bool
    language: str | None = None
    text: str = ""
    segments: list[TimedText] = field(default_factory=list)
    words: list[TimedText] = field(default_factory=list)


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    checkpoint = Checkpoint(settings_manager, "whisper", "openai/whisper-base")


def load_model() -> None:
    global model, processor
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    processor = checkpoint.load_processor(WhisperProcessor)
    model = checkpoint.load_model(WhisperForConditionalGeneration, may_lack=("proj_out.",))


def automated_speech_recognition(audio: list[Audio], config: dict[str, Any]) -> list[Any]:
    import torch

    arguments = _generation_arguments(config)
    timestamps = arguments.pop("timestamps", None)
    windows = [window for index, recording in enumerate(audio) for window in _windows(index, recording)]
    audible = [window for window in windows if _is_audible(window.samples)]
    with torch.inference_mode():
        language = arguments.pop("language", None)
        if _is_multilingual():
            _tell_languages(audible, language)
        # The windows of a call have one way of decoding: with timestamps, by which the model finds its way through a
        # window that begins or ends anywhere, or without them, as whole short recordings are usually decoded.
        for with_times in (False, True):
            alike = [window for window in audible if (window.is_part or timestamps is not None) is with_times]
            for start in range(0, len(alike), WINDOWS_A_CALL):
                _transcribe(alike[start : start + WINDOWS_A_CALL], with_times, timestamps, arguments)
    spoken: list[list[Window]] = [[] for _ in audio]
    for window in windows:
        if any(map(str.isalnum, window.text)):
            spoken[window.recording].append(window)
    return [_answer(parts, timestamps) for parts in spoken]


def _answer(windows: list[Window], timestamps: str | None) -> Any:
    """Return what a recording's windows say, as the task wants it."""
    text = " ".join(window.text for window in windows)
    if timestamps is None:
        return text
    english = None if _is_multilingual() else "en"
    answer = {
        "text": text,
        "language": (windows[0].language or english) if windows else None,
        "segments": [segment for window in windows for segment in window.segments],
    }
    if timestamps == "words":
        answer["words"] = [word for window in windows for word in window.words]
    return answer


def _generation_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Check what only the checkpoint can tell, and return the arguments of ``generate``."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    arguments = dict(config)
    if arguments.get("timestamps") == "words" and not getattr(model.generation_config, "alignment_heads", None):
        raise InvalidInput(
            "config.timestamps: this checkpoint of Whisper can tell the times of segments only, since it does not say "
            "which of its attention heads follow the words (alignment_heads)",
            field="config.timestamps",
        )
    language = arguments.pop("language", None)
    code = None if language is None else TO_LANGUAGE_CODE.get(language.lower(), language.lower())
    if not _is_multilingual():
        if code not in (None, "en"):
            message = f"this checkpoint of Whisper knows English only, not {language!r}"
            raise InvalidInput(f"config.language: {message}", field="config.language")
        if arguments.pop("task", "transcribe") != "transcribe":
            raise InvalidInput(
                "config.task: this checkpoint of Whisper knows English only, and cannot translate", field="config.task"
            )
        return arguments
    if code is not None and f"<|{code}|>" not in model.generation_config.lang_to_id:
        raise InvalidInput(
            f"config.language: this checkpoint of Whisper knows no {language!r}", field="config.language"
        )
    return {"task": "transcribe"} | arguments | ({"language": code} if code else {})


def _is_multilingual() -> bool:
    return bool(getattr(model.generation_config, "is_multilingual", True))


def _windows(recording: int, audio: Audio) -> Iterator[Window]:
    samples = audio.resampled(SAMPLING_RATE).samples
    is_part = len(samples) > WINDOW
    start = 0
    while len(samples) - start > WINDOW:
        cut_after = start + WINDOW - CUT_WITHIN
        end = cut_after + _quietest(samples[cut_after : start + WINDOW])
        yield Window(recording, start / SAMPLING_RATE, samples[start:end], is_part)
        start = end
    yield Window(recording, start / SAMPLING_RATE, samples[start:], is_part)


def _quietest(samples: Samples) -> int:
    """Return where the samples are quietest: the middle of the place, if it is long."""
    import numpy as np

    power = np.square(samples.reshape(-1, FRAME)).mean(axis=1)
    power = np.convolve(power, np.full(SMOOTHED_FRAMES, 1 / SMOOTHED_FRAMES), "same")
    quiet = np.flatnonzero(power <= power.min() * 1.0001 + 1e-12)
    return int(quiet[len(quiet) // 2]) * FRAME + FRAME // 2


def _is_audible(samples: Samples) -> bool:
    return len(samples) >= SHORTEST and max(float(samples.max()), -float(samples.min())) > FAINTEST


def _tell_languages(windows: list[Window], language: str | None) -> None:
    """Give every window its recording's language: the one asked for, or that of the recording's first window."""
    first = {window.recording: window for window in reversed(windows)}
    languages = dict.fromkeys(first, language)
    if language is None:
        codes = {number: token.strip("<|>") for token, number in model.generation_config.lang_to_id.items()}
        heads = list(first.values())
        for start in range(0, len(heads), WINDOWS_A_CALL):
            part = heads[start : start + WINDOWS_A_CALL]
            numbers = model.detect_language(input_features=_features(part)["input_features"]).tolist()
            languages |= {window.recording: codes[number] for window, number in zip(part, numbers, strict=True)}
    for window in windows:
        window.language = languages[window.recording]


def _transcribe(windows: list[Window], with_times: bool, timestamps: str | None, arguments: dict[str, Any]) -> None:
    if windows[0].language is not None:
        arguments = arguments | {"language": [window.language for window in windows]}
    output = model.generate(
        **_features(windows), **arguments, return_timestamps=with_times, return_segments=timestamps is not None
    )
    tokens = (output if timestamps is None else output["sequences"]).long()
    for window, text in zip(windows, processor.batch_decode(tokens, skip_special_tokens=True), strict=True):
        window.text = text.strip()
    if timestamps is None:
        return
    for window, row, segments in zip(windows, tokens.tolist(), output["segments"], strict=True):
        told = ((one["start"], one["end"], processor.decode(one["tokens"])) for one in segments)
        window.segments = _timed(told, window)
        if timestamps == "words":
            window.words = _timed(_words(row, window, arguments.get("task")), window)


def _timed(told: Iterable[tuple[float, float, str]], window: Window) -> list[TimedText]:
    """Return what is said as the task wants it, with the times in the whole recording instead of the window."""
    end = len(window.samples) / SAMPLING_RATE  # behind it, the model hears silence
    return [
        {"start": window.start + min(float(first), end), "end": window.start + min(float(last), end), "text": text}
        for first, last, words in told
        if (text := words.strip())
    ]


def _words(tokens: list[int], window: Window, task: str | None) -> Iterator[tuple[float, float, str]]:
    """Put a window's tokens together to words, each with its beginning and its end in the window."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, _combine_tokens_into_words

    language = "en" if window.language is None or task == "translate" else window.language
    spoken = [token for token in tokens if token < processor.tokenizer.eos_token_id]  # no timestamps
    if not spoken:
        return
    times = _token_times(spoken, window, task)
    words, _, places = _combine_tokens_into_words(processor.tokenizer, spoken, LANGUAGES.get(language))
    for word, place in zip(words, places, strict=True):
        # A full stop takes as long as the silence that follows.
        sounds = [index for index in place if not _is_punctuation(spoken[index])] or place
        yield times[place[0]], times[sounds[-1] + 1], word


def _is_punctuation(token: int) -> bool:
    text = processor.tokenizer.decode([token])
    return not any(letter.isalnum() or letter == "\N{REPLACEMENT CHARACTER}" for letter in text)  # half a letter


def _token_times(tokens: list[int], window: Window, task: str | None) -> list[float]:
    """Return when each token begins and, at last, when the last one ends, in seconds from the window's beginning.

    With each token some of the decoder's attention heads follow the sound of the next one. Dynamic time warping finds
    the way on which all tokens together get most of their attention.
    """
    import numpy as np
    from transformers.models.whisper.generation_whisper import _dynamic_time_warping, _median_filter

    generation = model.generation_config
    prompt = [generation.decoder_start_token_id]
    if window.language is not None:
        prompt += [generation.lang_to_id[f"<|{window.language}|>"], generation.task_to_id[task or "transcribe"]]
    prompt.append(generation.no_timestamps_token_id)
    fitting = tokens[: model.config.max_target_positions - len(prompt)]
    attention = _attention([*prompt, *fitting], window)[..., : max(1, len(window.samples) // FRAME)]
    attention = (attention - attention.mean(dim=1, keepdim=True)) / (attention.std(dim=1, keepdim=True) + 1e-9)
    likeness = _median_filter(attention, model.config.median_filter_width).mean(dim=0)[len(prompt) - 1 :]
    rows, columns = _dynamic_time_warping(-likeness.double().cpu().numpy())
    begins = columns[np.flatnonzero(np.diff(rows, prepend=-1))] * (FRAME / SAMPLING_RATE)
    times: list[float] = begins.tolist()
    return times + times[-1:] * (len(tokens) - len(fitting))


def _attention(tokens: list[int], window: Window) -> torch.Tensor:
    """Return how much of each alignment head's attention goes where with each token, (n_heads, n_tokens, 1500)."""
    import torch

    layers: dict[int, list[int]] = {}
    for layer, head in model.generation_config.alignment_heads:
        layers.setdefault(layer, []).append(head)
    sound = model.get_encoder()(_features([window])["input_features"]).last_hidden_state
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
        model.get_decoder()(input_ids=torch.tensor([tokens], device=model.device), encoder_hidden_states=sound)
    finally:
        model.set_attn_implementation(implementation)
        for hook in hooks:
            hook.remove()
    return torch.cat(kept)


def _features(windows: list[Window]) -> dict[str, torch.Tensor]:
    features = processor.feature_extractor(
        [window.samples for window in windows],
        sampling_rate=SAMPLING_RATE,
        return_tensors="pt",
        return_attention_mask=True,
    )
    return {
        "input_features": features.input_features.to(model.device, model.dtype),
        "attention_mask": features.attention_mask.to(model.device),
    }
