"""Speech recognition by Whisper, in whichever library: what a client may ask, silence, windows, the answer's form."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from feature_extraction_server.core.config import Config
from feature_extraction_server.core.errors import InvalidInput

if TYPE_CHECKING:
    import numpy as np

    Samples = np.ndarray[Any, np.dtype[np.float32]]
    TimedText = dict[str, Any]

#: What the model hears, in Hz.
SAMPLING_RATE: Final = 16_000
#: How many samples the model hears at once.
WINDOW: Final = 30 * SAMPLING_RATE
#: A recording is cut somewhere in the last 10 s of a window, where it is quiet for 0.3 s; it is looked at every 20 ms.
_CUT_WITHIN: Final = 10 * SAMPLING_RATE
_FRAME: Final = SAMPLING_RATE // 50
_SMOOTHED_FRAMES: Final = 15
#: What has fewer samples, or none above the amplitude, is silence.
_SHORTEST: Final = SAMPLING_RATE // 10
_FAINTEST: Final = 1e-3

#: Of what tokens are drawn with. Scores that are divided by much less are no finite numbers any more.
LEAST_TEMPERATURE: Final = 0.01


class TranscriptionConfig(Config):
    """What a client may ask of a model that recognizes speech."""

    language: str | None = Field(None, max_length=40)
    task: Literal["transcribe", "translate"] = "transcribe"
    timestamps: Literal["segments", "words"] | None = None
    num_beams: int = Field(1, ge=1, le=16)
    temperature: float | None = Field(None, ge=0, le=1)
    max_new_tokens: int | None = Field(None, ge=1, le=440)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    no_repeat_ngram_size: int | None = Field(None, ge=0, le=100)

    @field_validator("temperature")
    @classmethod
    def _divides(cls, temperature: float | None) -> float | None:
        if temperature and temperature < LEAST_TEMPERATURE:
            raise ValueError(f"must be {LEAST_TEMPERATURE} or more to have tokens drawn")
        return temperature

    @model_validator(mode="after")
    def _fits_together(self) -> TranscriptionConfig:
        if self.num_beams > 1 and self.temperature:  # both libraries would draw tokens without beams, and not say so
            raise ValueError("num_beams has no effect unless temperature is left out")
        return self


def check_language(config: dict[str, Any], code: str | None, known: Collection[str]) -> None:
    """Check what only the checkpoint can tell: whether it knows a language, and can translate.

    Args:
        config: the request's, as ``TranscriptionConfig`` checked it.
        code: of the language that it names, if it does.
        known: the codes of the checkpoint's languages.

    Raises:
        InvalidInput: it does not.
    """
    english_only = set(known) == {"en"}
    if code is not None and code not in known:
        asked = repr(config["language"])
        knows = f"English only, not {asked}" if english_only else f"no {asked}; codes name languages best, as 'de'"
        raise InvalidInput(f"config.language: this checkpoint of Whisper knows {knows}", field="config.language")
    if english_only and config.get("task") == "translate":
        reason = "config.task: this checkpoint of Whisper knows English only, and cannot translate"
        raise InvalidInput(reason, field="config.task")


def is_audible(samples: Samples) -> bool:
    """Tell whether there is more than silence, given which a model makes words up."""
    return len(samples) >= _SHORTEST and max(float(samples.max()), -float(samples.min())) > _FAINTEST


def windows(samples: Samples) -> Iterator[tuple[float, Samples]]:
    """Cut a recording into windows of at most 30 s where it is quietest.

    Yields:
        Where a window begins in the recording, in seconds, and its samples.
    """
    start = 0
    while len(samples) - start > WINDOW:
        cut_after = start + WINDOW - _CUT_WITHIN
        end = cut_after + _quietest(samples[cut_after : start + WINDOW])
        yield start / SAMPLING_RATE, samples[start:end]
        start = end
    yield start / SAMPLING_RATE, samples[start:]


def _quietest(samples: Samples) -> int:
    """Return where the samples are quietest: the middle of the place, if it is long."""
    import numpy as np

    power = np.square(samples.reshape(-1, _FRAME)).mean(axis=1)
    power = np.convolve(power, np.full(_SMOOTHED_FRAMES, 1 / _SMOOTHED_FRAMES), "same")
    quiet = np.flatnonzero(power <= power.min() * 1.0001 + 1e-12)
    return int(quiet[len(quiet) // 2]) * _FRAME + _FRAME // 2


def timed(
    told: Iterable[tuple[float, float, str]], window_start: float = 0, window_seconds: float = math.inf
) -> list[TimedText]:
    """Return segments or words as the task wants them, with their times in the whole recording.

    Args:
        told: of each, when it begins and ends in its window, in seconds, and its text; one without a text is dropped.
        window_start: where the window begins in the recording, in seconds.
        window_seconds: how long the window is; behind it, the model hears silence.
    """
    return [
        {
            "start": window_start + min(float(start), window_seconds),
            "end": window_start + min(float(end), window_seconds),
            "text": text,
        }
        for start, end, spoken in told
        if (text := spoken.strip())
    ]


def answer(
    text: str, language: str | None, segments: list[TimedText], words: list[TimedText], config: dict[str, Any]
) -> str | dict[str, Any]:
    """Return what the task answers for a recording.

    Args:
        text: all that is said; without a letter or a digit, it is nothing.
        language: the code of the spoken one.
        segments, words: as ``timed`` gives them, if the request asks for them.
        config: the request's, as ``TranscriptionConfig`` checked it.
    """
    if not any(map(str.isalnum, text)):
        text, language, segments, words = "", None, [], []
    timestamps = config.get("timestamps")
    if timestamps is None:
        return text
    transcript = {"text": text, "language": language, "segments": segments}
    return transcript | {"words": words} if timestamps == "words" else transcript
