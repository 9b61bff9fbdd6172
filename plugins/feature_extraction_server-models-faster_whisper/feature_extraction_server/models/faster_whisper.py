"""Whisper by CTranslate2, through faster-whisper: the words that are spoken in recordings, with int8 weights on a CPU.

Weights: Systran/faster-whisper-base, MIT (OpenAI's, converted). Library: https://github.com/SYSTRAN/faster-whisper, MIT
"""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import Field

from feature_extraction_server.core.checkpoints import REPLICA_VARIABLE, Checkpoint
from feature_extraction_server.core.config import Config
from feature_extraction_server.core.cores import N_CORES
from feature_extraction_server.core.errors import InvalidInput, ModelLoadFailed
from feature_extraction_server.core.media import Audio
from feature_extraction_server.core.settings import SettingsManager

FILES = ("config.json", "model.bin", "preprocessor_config.json", "tokenizer.json", "vocabulary.*")
SAMPLING_RATE = 16_000
# Given silence, the model makes words up.
SHORTEST_S = 0.1
FAINTEST = 1e-3


class TranscriptionConfig(Config):
    """What a client may ask of this model."""

    language: str | None = Field(None, max_length=40)
    task: Literal["transcribe", "translate"] = "transcribe"
    timestamps: Literal["segments", "words"] | None = None
    vad_filter: bool = False
    num_beams: int = Field(1, ge=1, le=16)
    temperature: float = Field(0, ge=0, le=1)
    max_new_tokens: int | None = Field(None, ge=1, le=440)
    repetition_penalty: float = Field(1, ge=0.1, le=10)
    no_repeat_ngram_size: int = Field(0, ge=0, le=100)


config_types = {"automated_speech_recognition": TranscriptionConfig}

checkpoint: Checkpoint
model: Any


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    checkpoint = Checkpoint(settings_manager, "faster_whisper", "Systran/faster-whisper-base", files=FILES)


def load_model() -> None:
    global model
    from faster_whisper import WhisperModel

    device, index = _device()
    with checkpoint.loading() as folder:
        for name in ("config.json", "tokenizer.json"):  # CTranslate2 would go on, and the library ask the hub
            if not (folder / name).is_file():
                raise FileNotFoundError(f"it has no {name}")
        model = WhisperModel(
            str(folder),
            device=device,
            device_index=index,
            compute_type=_compute_type(device),
            cpu_threads=0 if os.environ.get("OMP_NUM_THREADS") else N_CORES,  # 0 is what the variable says
        )


def provenance() -> dict[str, str]:
    """Return which weights the texts come from, and how and where they are computed."""
    return {
        "checkpoint": checkpoint.name,
        "revision": checkpoint.revision,
        "dtype": model.model.compute_type,
        "device": model.model.device,
    }


def automated_speech_recognition(audio: list[Audio], config: dict[str, Any]) -> list[Any]:
    wanted = TranscriptionConfig(**config)
    language = _language(wanted)
    return [_transcribe(recording, language, wanted) for recording in audio]


def _device() -> tuple[str, int]:
    """Return the kind and the number of the device that DEVICE names; of several GPUs, a replica's own."""
    import ctranslate2

    name = checkpoint.wanted_device
    n_gpus = ctranslate2.get_cuda_device_count()
    if name == "auto":
        name = "cuda" if n_gpus else "cpu"
    kind, _, number = name.partition(":")
    index = int(number) if number else int(os.environ.get(REPLICA_VARIABLE, 0)) % max(1, n_gpus)
    if kind == "mps":
        raise ModelLoadFailed("DEVICE=mps: CTranslate2, which runs this model, knows no such device; cpu works")
    if kind == "cuda" and index >= n_gpus:
        raise ModelLoadFailed(f"DEVICE={name}: this machine has no such device")
    return kind, index if kind == "cuda" else 0


def _compute_type(device: str) -> str:
    """Return CTranslate2's name of the precision that DTYPE names; auto is int8 on a CPU."""
    import ctranslate2

    name = checkpoint.wanted_dtype
    if name == "auto":
        return "float16" if device == "cuda" else "int8"
    if name not in ctranslate2.get_supported_compute_types(device):
        raise ModelLoadFailed(f"DTYPE={name}: CTranslate2, which runs this model, has none such on this {device}")
    return name


def _language(wanted: TranscriptionConfig) -> str | None:
    """Return the language's code, or None if it is to be detected; check what only the checkpoint can tell."""
    code = None if wanted.language is None else wanted.language.lower()
    if code is not None and code not in model.supported_languages:
        known = "knows English only, and no" if not model.model.is_multilingual else "knows no code"
        message = f"this checkpoint of Whisper {known} {wanted.language!r}; languages are given as codes, as 'de'"
        raise InvalidInput(f"config.language: {message}", field="config.language")
    if wanted.task == "translate" and not model.model.is_multilingual:
        message = "this checkpoint of Whisper knows English only, and cannot translate"
        raise InvalidInput(f"config.task: {message}", field="config.task")
    return code


def _transcribe(recording: Audio, language: str | None, wanted: TranscriptionConfig) -> Any:
    segments: list[Any] = []
    info = None
    samples = recording.resampled(SAMPLING_RATE).samples
    if recording.seconds >= SHORTEST_S and max(float(samples.max()), -float(samples.min())) > FAINTEST:
        arguments = {
            "vad_filter": wanted.vad_filter,
            "language": language,
            "task": wanted.task,
            "beam_size": wanted.num_beams,
            "temperature": wanted.temperature,
            "max_new_tokens": wanted.max_new_tokens,
            "repetition_penalty": wanted.repetition_penalty,
            "no_repeat_ngram_size": wanted.no_repeat_ngram_size,
            "word_timestamps": wanted.timestamps == "words",
            # A text that a window inherits can have it repeat the same words to its end.
            "condition_on_previous_text": False,
        }
        told, info = model.transcribe(samples, **arguments)
        segments = list(told)
    text = "".join(segment.text for segment in segments).strip()
    if not any(map(str.isalnum, text)):
        text, segments = "", []
    if wanted.timestamps is None:
        return text
    answer = {"text": text, "language": info.language if info and text else None, "segments": _timed(segments)}
    if wanted.timestamps == "words":
        answer["words"] = [word for segment in segments for word in _timed(segment.words or ())]
    return answer


def _timed(told: Any) -> list[dict[str, Any]]:
    """Return segments or words of the library as the task wants them."""
    texts = ((one.start, one.end, getattr(one, "word", None) or getattr(one, "text", "")) for one in told)
    return [{"start": start, "end": end, "text": text.strip()} for start, end, text in texts if text.strip()]
