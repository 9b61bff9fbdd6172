"""Whisper: the words that are spoken in recordings of any length.

A recording is cut into windows of at most 30 s, which is what the model hears at once, where it is quietest. Windows go
through the model in batches of a fixed size, whichever recordings they belong to, so that memory stays bounded. Where
the model does not get to a window's end, what is left is a window of its own.

Weights: openai/whisper-base, Apache-2.0 (OpenAI's own release: MIT). Paper: https://arxiv.org/abs/2212.04356
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pydantic import Field

from feature_extraction_server.core import speech
from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.errors import InvalidInput
from feature_extraction_server.core.media import Audio
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.models.whisper.word_times import spoken_words

if TYPE_CHECKING:
    import torch

WINDOWS_A_CALL: Final = 8


class WhisperConfig(speech.TranscriptionConfig):
    """What a client may ask of this model."""

    temperature: float | None = Field(None, ge=speech.LEAST_TEMPERATURE, le=1)


config_types = {"automated_speech_recognition": WhisperConfig}

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
    samples: Any
    is_part: bool
    language: str | None = None
    text: str = ""
    segments: list[dict[str, Any]] = field(default_factory=list)
    words: list[dict[str, Any]] = field(default_factory=list)


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

    language = _language(config)
    windows = [window for index, recording in enumerate(audio) for window in _windows(index, recording)]
    audible = [window for window in windows if speech.is_audible(window.samples)]
    with torch.inference_mode():
        if _is_multilingual():
            _tell_languages(audible, language)
        # The windows of a call have one way of decoding: with timestamps, by which the model finds its way through a
        # window that begins or ends anywhere, or without them, as whole short recordings are usually decoded.
        for with_times in (False, True):
            alike = [window for window in audible if (window.is_part or "timestamps" in config) is with_times]
            while alike:
                rests: list[Window] = []
                for start in range(0, len(alike), WINDOWS_A_CALL):
                    rests += _transcribe(alike[start : start + WINDOWS_A_CALL], with_times, config)
                windows += rests
                alike = [rest for rest in rests if speech.is_audible(rest.samples)]
    spoken: list[list[Window]] = [[] for _ in audio]
    for window in sorted(windows, key=lambda window: window.start):
        if any(map(str.isalnum, window.text)):
            spoken[window.recording].append(window)
    return [_answer(parts, config) for parts in spoken]


def _windows(recording: int, audio: Audio) -> Iterator[Window]:
    parts = list(speech.windows(audio.resampled(speech.SAMPLING_RATE).samples))
    for start, samples in parts:
        yield Window(recording, start, samples, len(parts) > 1)


def _answer(windows: list[Window], config: dict[str, Any]) -> Any:
    """Return what a recording's windows say, as the task wants it."""
    return speech.answer(
        " ".join(window.text for window in windows),
        windows[0].language or "en" if windows else None,
        [segment for window in windows for segment in window.segments],
        [word for window in windows for word in window.words],
        config,
    )


def _language(config: dict[str, Any]) -> str | None:
    """Check what only the checkpoint can tell; return the code of the language, or None if it is to be detected."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    if config.get("timestamps") == "words" and not getattr(model.generation_config, "alignment_heads", None):
        raise InvalidInput(
            "config.timestamps: this checkpoint of Whisper can tell the times of segments only, since it does not say "
            "which of its attention heads follow the words (alignment_heads)",
            field="config.timestamps",
        )
    code: str | None = config.get("language")
    if code is not None:
        code = TO_LANGUAGE_CODE.get(code.lower(), code.lower())
    speech.check_language(config, code, _languages().values() if _is_multilingual() else ("en",))
    return code


def _is_multilingual() -> bool:
    return bool(getattr(model.generation_config, "is_multilingual", True))


def _languages() -> dict[int, str]:
    """Return the codes of a multilingual checkpoint's languages, by the tokens that stand for them."""
    return {number: token.strip("<|>") for token, number in model.generation_config.lang_to_id.items()}


def _tell_languages(windows: list[Window], language: str | None) -> None:
    """Give every window its recording's language: the one asked for, or that of the recording's first window."""
    first = {window.recording: window for window in reversed(windows)}
    languages = dict.fromkeys(first, language)
    if language is None:
        codes = _languages()
        heads = list(first.values())
        for start in range(0, len(heads), WINDOWS_A_CALL):
            part = heads[start : start + WINDOWS_A_CALL]
            numbers = model.detect_language(input_features=_features(part)["input_features"]).tolist()
            languages |= {window.recording: codes[number] for window, number in zip(part, numbers, strict=True)}
    for window in windows:
        window.language = languages[window.recording]


def _transcribe(windows: list[Window], with_times: bool, config: dict[str, Any]) -> list[Window]:
    """Write what is said in windows into them.

    Returns:
        What is left of them: a window in which the model began a segment that it did not end is cut there.
    """
    arguments = {key: value for key, value in config.items() if key not in ("language", "task", "timestamps")}
    task = config.get("task", "transcribe")
    if _is_multilingual():
        arguments |= {"task": task, "language": [window.language for window in windows]}
    # In one pass: generate would look for more up to 30 s, whatever the mask says, and given padding, the model makes
    # words up.
    output = model.generate(
        **_features(windows),
        **arguments,
        return_timestamps=with_times,
        return_segments=True,
        force_unique_generate_call=True,
    )
    timestamps = config.get("timestamps")
    rests = []
    for window, segments in zip(windows, output["segments"], strict=True):
        told = [(float(one["start"]), float(one["end"]), one["tokens"].tolist()) for one in segments]
        if (rest := _rest(window, told)) is not None:
            rests.append(rest)
        seconds = len(window.samples) / speech.SAMPLING_RATE
        # What begins behind the window's end is made up. Yet the first words of a short recording may be told late.
        told = [one for index, one in enumerate(told) if index == 0 or one[0] < seconds]
        tokens = [token for _, _, part in told for token in part]
        window.text = processor.decode(tokens, skip_special_tokens=True).strip()
        if timestamps is None:
            continue
        texts = ((start, end, processor.decode(part)) for start, end, part in told)
        window.segments = speech.timed(texts, window.start, seconds)
        if timestamps == "words":
            sound = _features([window])["input_features"]
            words = spoken_words(model, processor.tokenizer, tokens, sound, len(window.samples), window.language, task)
            window.words = speech.timed(words, window.start, seconds)
    return rests


def _rest(window: Window, told: list[tuple[float, float, list[int]]]) -> Window | None:
    """Cut a window where its last segment ends, if the model began another one there; return what is left.

    Args:
        window: which is made shorter.
        told: of each segment that the model wrote, when it begins and ends in the window, in seconds, and its tokens.
    """
    _, end, tokens = told[-1]
    # A checkpoint that does not name this token writes texts without timestamps only.
    no_timestamps = getattr(model.generation_config, "no_timestamps_token_id", model.config.vocab_size)
    begins_another = len(tokens) > 1 and min(tokens[-2:]) > no_timestamps
    n_samples = round(end * speech.SAMPLING_RATE)
    if not begins_another or not 0 < n_samples < len(window.samples):
        return None
    samples, window.samples = window.samples[n_samples:], window.samples[:n_samples]
    start = window.start + n_samples / speech.SAMPLING_RATE
    return Window(window.recording, start, samples, window.is_part, window.language)


def _features(windows: list[Window]) -> dict[str, torch.Tensor]:
    features = processor.feature_extractor(
        [window.samples for window in windows],
        sampling_rate=speech.SAMPLING_RATE,
        return_tensors="pt",
        return_attention_mask=True,
    )
    return {
        "input_features": features.input_features.to(model.device, model.dtype),
        "attention_mask": features.attention_mask.to(model.device),
    }
