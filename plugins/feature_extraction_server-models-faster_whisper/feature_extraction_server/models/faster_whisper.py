"""Whisper by CTranslate2, through faster-whisper: the words that are spoken in recordings, with int8 weights on a CPU.

Weights: Systran/faster-whisper-base, MIT (OpenAI's, converted). Library: https://github.com/SYSTRAN/faster-whisper, MIT
"""

from __future__ import annotations

import ctypes
import logging
import os
from importlib import metadata
from typing import Any, Final

from pydantic import Field

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.cores import N_CORES
from feature_extraction_server.core.errors import ModelLoadFailed
from feature_extraction_server.core.media import Audio
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.speech import (
    SAMPLING_RATE,
    TranscriptionConfig,
    answer,
    check_language,
    is_audible,
    timed,
)

logger = logging.getLogger(__name__)

FILES: Final = ("config.json", "model.bin", "preprocessor_config.json", "tokenizer.json", "vocabulary.*")
#: The library's arguments unless a request says otherwise. A text that a window inherits can have it repeat the same
#: words to its end.
ARGUMENTS: Final = {"beam_size": 1, "temperature": 0, "condition_on_previous_text": False}
#: The library of CUDA's that CTranslate2 needs, after the one that this needs, and the package that has both.
CUBLAS: Final = ("libcublasLt.so.12", "libcublas.so.12")
CUBLAS_PACKAGE: Final = "nvidia-cublas-cu12"


class FasterWhisperConfig(TranscriptionConfig):
    """What a client may ask of this model."""

    vad_filter: bool = False
    temperature: float = Field(0, ge=0, le=1)


config_types = {"automated_speech_recognition": FasterWhisperConfig}

checkpoint: Checkpoint
model: Any


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    checkpoint = Checkpoint(settings_manager, "faster_whisper", "Systran/faster-whisper-base", files=FILES)


def load_model() -> None:
    global model
    from faster_whisper import WhisperModel

    device, _, number = _device().partition(":")
    with checkpoint.loading() as folder:
        for name in ("config.json", "tokenizer.json"):  # CTranslate2 would go on, and the library ask the hub
            if not (folder / name).is_file():
                raise FileNotFoundError(f"it has no {name}")
        model = WhisperModel(
            str(folder),
            device=device,
            device_index=int(number or 0),
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
    wanted = dict(config)
    timestamps = wanted.pop("timestamps", None)
    if (language := wanted.get("language")) is not None:
        wanted["language"] = language.lower()
    if "num_beams" in wanted:
        wanted["beam_size"] = wanted.pop("num_beams")
    check_language(config, wanted.get("language"), model.supported_languages)
    arguments = ARGUMENTS | wanted | {"word_timestamps": timestamps == "words"}
    return [_transcribe(recording.resampled(SAMPLING_RATE).samples, arguments, config) for recording in audio]


def _transcribe(samples: Any, arguments: dict[str, Any], config: dict[str, Any]) -> Any:
    if not is_audible(samples):
        return answer("", None, [], [], config)
    told, info = model.transcribe(samples, **arguments)
    segments = list(told)
    return answer(
        "".join(segment.text for segment in segments).strip(),
        info.language,
        timed((segment.start, segment.end, segment.text) for segment in segments),
        timed((word.start, word.end, word.word) for segment in segments for word in segment.words or ()),
        config,
    )


def _device() -> str:
    """Return the device that DEVICE names or, for auto, the best that CTranslate2 can use.

    Raises:
        ModelLoadFailed: there is no such device here, or not the library that it needs.
    """
    import ctranslate2

    device = checkpoint.device_among({"cuda": ctranslate2.get_cuda_device_count()})
    try:
        if device.startswith("cuda"):
            _load_cublas()
        return device
    except OSError as error:
        missing = (
            f"CTranslate2 needs {CUBLAS[-1]}, of CUDA 12, which cannot be loaded ({error}); "
            f"to install it: pip install {CUBLAS_PACKAGE}"
        )
    try:
        other = checkpoint.device_among({"cuda": 0})  # there is one only where DEVICE leaves the choice
    except ModelLoadFailed:
        raise ModelLoadFailed(f"DEVICE={device}: {missing}") from None
    logger.warning("The model faster_whisper runs on the CPU, not on the GPU: %s", missing)
    return other


def _load_cublas() -> None:
    """Load the library that CTranslate2 would look for in the first request, and never in its package.

    Raises:
        OSError: it is not there, or cannot be loaded.
    """
    try:
        ctypes.CDLL(CUBLAS[-1])  # where the system looks, or loaded already by torch
    except OSError:
        files = [file for package in metadata.distributions(name=CUBLAS_PACKAGE) for file in package.files or ()]
        paths = {file.name: str(file.locate()) for file in files}
        if not paths.keys() >= set(CUBLAS):
            raise
        for name in CUBLAS:  # whoever asks for them by name gets what is loaded
            ctypes.CDLL(paths[name])


def _compute_type(device: str) -> str:
    """Return CTranslate2's name of the precision that DTYPE names; auto is int8 on a CPU."""
    import ctranslate2

    name = checkpoint.wanted_dtype
    if name == "auto":
        return "float16" if device == "cuda" else "int8"
    if name not in ctranslate2.get_supported_compute_types(device):
        raise ModelLoadFailed(f"DTYPE={name}: CTranslate2, which runs this model, has none such on this {device}")
    return name
