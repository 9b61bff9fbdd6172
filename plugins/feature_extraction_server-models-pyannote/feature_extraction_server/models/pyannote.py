"""pyannote.audio's pipeline community-1: who speaks when in recordings.

Weights: pyannote/speaker-diarization-community-1, CC-BY-4.0, gated.
Library: https://github.com/pyannote/pyannote-audio, MIT
"""

from __future__ import annotations

import os
import warnings
from typing import Any, Final

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.config import DiarizationConfig
from feature_extraction_server.core.errors import ModelLoadFailed
from feature_extraction_server.core.media import Audio
from feature_extraction_server.core.settings import SettingsManager

FILES: Final = ("config.yaml", "*/pytorch_model.bin", "*/*.npz")
SAMPLING_RATE: Final = 16_000

config_types = {"audio_diarization": DiarizationConfig}

checkpoint: Checkpoint
model: Any


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint
    token = settings_manager.add_setting(
        name="PYANNOTE_TOKEN",
        type=str,
        default=None,
        description="The Hugging Face hub's token for the gated checkpoint of the model pyannote; by default HF_TOKEN",
    )
    hub_name = "pyannote/speaker-diarization-community-1"
    checkpoint = Checkpoint(settings_manager, "pyannote", hub_name, files=FILES, token=token)


def load_model() -> None:
    global model
    # Unless told otherwise, the library reports the length of each recording to its makers.
    os.environ.setdefault("PYANNOTE_METRICS_ENABLED", "0")
    # It says so where it could not decode recordings, which come decoded.
    warnings.filterwarnings("ignore", r"\s*torchcodec is not installed", UserWarning)
    try:
        from pyannote.audio import Pipeline
        from pyannote.audio.pipelines import SpeakerDiarization
    except (ImportError, OSError) as error:  # OSError: a torchaudio that was built for another kind of torch
        reason = f"the library pyannote.audio cannot be imported: {error}; the model's README tells how to install it"
        raise ModelLoadFailed(reason) from error
    device = checkpoint.device
    with checkpoint.loading() as folder:
        pipeline = Pipeline.from_pretrained(folder)
        if not isinstance(pipeline, SpeakerDiarization):
            raise ValueError(f"its pipeline is {type(pipeline).__name__}, not SpeakerDiarization")
    model = pipeline.to(device)


def provenance() -> dict[str, str]:
    """Return which weights the segments come from, and how and where they are computed."""
    return checkpoint.provenance() | {"dtype": "float32"}


def audio_diarization(audio: list[Audio], config: dict[str, Any]) -> list[list[dict[str, Any]]]:
    return [_diarize(recording, config) for recording in audio]


def _diarize(recording: Audio, config: dict[str, Any]) -> list[dict[str, Any]]:
    import torch

    samples = torch.tensor(recording.resampled(SAMPLING_RATE).samples)
    found = model({"waveform": samples[None], "sample_rate": SAMPLING_RATE}, **config).speaker_diarization
    return [
        {"start": turn.start, "end": turn.end, "speaker": speaker}
        for turn, _, speaker in found.itertracks(yield_label=True)
    ]
