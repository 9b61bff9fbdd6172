"""Segmentation-3.0 and CAM++ through sherpa-onnx: who speaks when in recordings.

Weights: pyannote's segmentation-3.0 (MIT) and 3D-Speaker's CAM++ (Apache-2.0), both as ONNX by sherpa-onnx's authors.
Library: https://github.com/k2-fsa/sherpa-onnx, Apache-2.0
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from feature_extraction_server.core import torch_threads
from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.config import MAX_SPEAKERS, DiarizationConfig
from feature_extraction_server.core.media import Audio
from feature_extraction_server.core.settings import SettingsManager

SEGMENTATION_FILE = "model.onnx"
EMBEDDING_FILE = "3dspeaker_speech_campplus_sv_zh_en_16k-common_advanced.onnx"
# The library ends the process where a file lacks what it reads of it.
SEGMENTATION_PROPERTIES = {"num_speakers", "powerset_max_classes", "num_classes", "sample_rate", "window_size"}
SEGMENTATION_PROPERTIES |= {"receptive_field_size", "receptive_field_shift"}
EMBEDDING_PROPERTIES = {"framework", "sample_rate", "output_dim"}
# The library heeds the number of speakers only where there is more than one window, of 10 s.
COUNTED_S = 12

# The library holds Python's interpreter lock while it computes, which would keep all other models waiting.
consumer_type = "process_consumer"
config_types = {"audio_diarization": DiarizationConfig}

checkpoint: Checkpoint
embedding: Checkpoint
model: Any
settings: Any


def add_settings(settings_manager: SettingsManager) -> None:
    global checkpoint, embedding
    hub_name = "csukuangfj/sherpa-onnx-pyannote-segmentation-3-0"
    checkpoint = Checkpoint(settings_manager, "sherpa_onnx", hub_name, files=(SEGMENTATION_FILE,))
    hub_name = "csukuangfj/speaker-embedding-models"
    embedding = Checkpoint(settings_manager, "sherpa_onnx_embedding", hub_name, files=(EMBEDDING_FILE,))


def load_model() -> None:
    global model, settings
    import sherpa_onnx as library

    n_threads = torch_threads.share()
    with checkpoint.loading() as folder:
        pyannote = library.OfflineSpeakerSegmentationPyannoteModelConfig(
            model=_file(folder, SEGMENTATION_FILE, SEGMENTATION_PROPERTIES)
        )
    with embedding.loading() as folder:
        settings = library.OfflineSpeakerDiarizationConfig(
            segmentation=library.OfflineSpeakerSegmentationModelConfig(pyannote=pyannote, num_threads=n_threads),
            embedding=library.SpeakerEmbeddingExtractorConfig(
                model=_file(folder, EMBEDDING_FILE, EMBEDDING_PROPERTIES), num_threads=n_threads
            ),
            clustering=library.FastClusteringConfig(),
        )
        model = library.OfflineSpeakerDiarization(settings)


def provenance() -> dict[str, str]:
    """Return which weights the segments come from, and how and where they are computed."""
    revisions = (checkpoint.revision, embedding.revision)
    return {
        "checkpoint": f"{checkpoint.name}, {embedding.name}",
        "revision": "local" if "local" in revisions else ", ".join(revisions),
        "dtype": "float32",
        "device": "cpu",
    }


def audio_diarization(audio: list[Audio], config: dict[str, Any]) -> list[list[dict[str, Any]]]:
    wanted = DiarizationConfig(**config)
    return [_diarize(recording, wanted) for recording in audio]


def _diarize(recording: Audio, wanted: DiarizationConfig) -> list[dict[str, Any]]:
    """Return who speaks when; where the model finds too few or too many, have it look again for the nearest number."""
    samples = recording.resampled(model.sample_rate).samples
    segments = _segments(samples, wanted.num_speakers)
    n_found = len({segment["speaker"] for segment in segments})
    n_speakers = min(max(n_found, wanted.min_speakers or 1), wanted.max_speakers or MAX_SPEAKERS)
    return _segments(samples, n_speakers) if n_found and n_speakers != n_found else segments


def _segments(samples: Any, n_speakers: int | None) -> list[dict[str, Any]]:
    import numpy as np

    settings.clustering.num_clusters = n_speakers or -1  # -1: by the distance between voices
    model.set_config(settings)
    if n_speakers:
        samples = np.pad(samples, (0, max(0, COUNTED_S * model.sample_rate - len(samples))))
    found = model.process(samples).sort_by_start_time()
    return [{"start": segment.start, "end": segment.end, "speaker": segment.speaker} for segment in found]


def _file(folder: Path, name: str, properties: set[str]) -> str:
    """Return a folder's ONNX file of this name or else the only one, once it is known to be of the right kind.

    Raises:
        FileNotFoundError: there is none, or several.
        ValueError: it lacks one of the properties.
    """
    from onnxruntime import InferenceSession

    files = [folder / name] if (folder / name).is_file() else list(folder.glob("*.onnx"))
    if len(files) != 1:
        raise FileNotFoundError(f"it has no {name}, and {len(files)} other files *.onnx")
    session = InferenceSession(str(files[0]), providers=["CPUExecutionProvider"])
    if missing := sorted(properties - session.get_modelmeta().custom_metadata_map.keys()):
        raise ValueError(f"{files[0].name} lacks the property {missing[0]}, which sherpa-onnx needs")
    return str(files[0])
