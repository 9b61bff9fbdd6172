"""Whisper: the words that are spoken in recordings of any length.

A recording is cut into windows of at most 30 s, which is what the model hears at once, where it is quietest. Windows go
through the model in batches of a fixed size, whichever recordings they belong to, so that memory stays bounded.

Weights: openai/whisper-base, Apache-2.0 (OpenAI's own release: MIT). Paper: https://arxiv.org/abs/2212.04356
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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

SAMPLING_RATE = 16_000
WINDOW = 30 * SAMPLING_RATE
CUT_WITHIN = 10 * SAMPLING_RATE  # a window is cut somewhere in its last 10 s
FRAME = SAMPLING_RATE // 50
SMOOTHED_FRAMES = 15  # loudness is measured over 0.3 s
WINDOWS_A_CALL = 8
# Given silence, the model makes words up.
SHORTEST = SAMPLING_RATE // 10
FAINTEST = 1e-3


class TranscriptionConfig(Config):
    """What a client may ask of this model."""

    language: str | None = Field(None, max_length=40)
    task: Literal["transcribe", "translate"] = "transcribe"
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
    """A part of a recording: whose it is, its samples at 16 kHz, whether there are others, what is said in it."""

    recording: int
    samples: Samples
    is_part: bool
    language: str | None = None
    text: str = ""


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    checkpoint = Checkpoint(settings_manager, "whisper", "openai/whisper-base")


def load_model() -> None:
    global model, processor
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    processor = checkpoint.load_processor(WhisperProcessor)
    model = checkpoint.load_model(WhisperForConditionalGeneration, may_lack=("proj_out.",))


def automated_speech_recognition(audio: list[Audio], config: dict[str, Any]) -> list[str]:
    import torch

    arguments = _generation_arguments(config)
    windows = [window for index, recording in enumerate(audio) for window in _windows(index, recording)]
    audible = [window for window in windows if _is_audible(window.samples)]
    with torch.inference_mode():
        if _is_multilingual():
            _tell_languages(audible, arguments.pop("language", None))
        # The windows of a call have one way of decoding: with timestamps, by which the model finds its way through a
        # window that begins or ends anywhere, or without them, as whole short recordings are usually decoded.
        for is_part in (False, True):
            alike = [window for window in audible if window.is_part is is_part]
            for start in range(0, len(alike), WINDOWS_A_CALL):
                _transcribe(alike[start : start + WINDOWS_A_CALL], return_timestamps=is_part, **arguments)
    texts: list[list[str]] = [[] for _ in audio]
    for window in windows:
        if any(map(str.isalnum, window.text)):
            texts[window.recording].append(window.text)
    return [" ".join(parts) for parts in texts]


def _generation_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Check what only the checkpoint can tell, and return the arguments of ``generate``."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    arguments = dict(config)
    language = arguments.pop("language", None)
    code = None if language is None else TO_LANGUAGE_CODE.get(language.lower(), language.lower())
    if not _is_multilingual():
        if code not in (None, "en") or arguments.pop("task", "transcribe") != "transcribe":
            message = "this checkpoint of Whisper knows English only: leave language and task out"
            raise InvalidInput(message, field="config.task" if code in (None, "en") else "config.language")
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
    while len(samples) > WINDOW:
        end = WINDOW - CUT_WITHIN + _quietest(samples[WINDOW - CUT_WITHIN : WINDOW])
        yield Window(recording, samples[:end], is_part)
        samples = samples[end:]
    yield Window(recording, samples, is_part)


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


def _transcribe(windows: list[Window], **arguments: Any) -> None:
    if windows[0].language is not None:
        arguments["language"] = [window.language for window in windows]
    tokens = model.generate(**_features(windows), **arguments)
    for window, text in zip(windows, processor.batch_decode(tokens.long(), skip_special_tokens=True), strict=True):
        window.text = text.strip()


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
