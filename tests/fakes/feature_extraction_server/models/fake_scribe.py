"""A model that hears the same two sentences in every recording, and tells what it was asked."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from feature_extraction_server.core.config import Config
from feature_extraction_server.core.media import Audio

SENTENCES = [("Tom & Jerry ---> <ran>", 0.0, 1.5), ("They\nstopped.", 1.5, 3661.25)]


class ScribeConfig(Config):
    language: str | None = None
    prompt: str | None = None
    task: Literal["transcribe", "translate"] = "transcribe"
    temperature: float | None = Field(None, gt=0, le=1)
    timestamps: Literal["segments", "words"] | None = None


config_types = {"automated_speech_recognition": ScribeConfig}


def load_model() -> None:
    pass


def automated_speech_recognition(audio: list[Audio], config: dict[str, Any]) -> list[Any]:
    timestamps = config.get("timestamps")
    text = str({key: value for key, value in sorted(config.items()) if key != "timestamps"})
    if timestamps is None:
        return [text for _ in audio]
    segments = [{"start": start, "end": end, "text": sentence} for sentence, start, end in SENTENCES]
    told = {"text": text, "language": config.get("language", "en"), "segments": segments}
    if timestamps == "words":
        told["words"] = [{"start": 0.25, "end": 0.5, "text": "Tom"}]
    return [told for _ in audio]
