"""pyannote.audio on a checkpoint with segmentation-3.0's trained weights and random ones for all else."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from feature_extraction_server.core import checkpoints
from feature_extraction_server.core.check import check
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.flask.app import create_app
from tests import pyannote_checkpoint
from tests.plugins.asking import Ask
from tests.plugins.hearing import RATE, encode
from tests.plugins.test_sherpa_onnx import n_speakers, speech
from tests.pyannote_checkpoint import write_config

pytestmark = pytest.mark.filterwarnings("ignore")  # the library and what it imports have many

TASK = "audio_diarization"
EMBEDDING_SIZE = 32
PLDA_SIZE = 16
ONE_TURN = encode(speech("two_voices", 4, 7.3))


@pytest.fixture(scope="module")
def library() -> Iterator[Any]:
    if not pyannote_checkpoint.FOLDER.is_dir():
        pytest.skip(pyannote_checkpoint.MISSING)
    with pyannote_checkpoint.library() as library:
        yield library


@pytest.fixture(scope="module")
def folder(library: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a smaller network for the voices than the real one's."""
    import torch

    folder = tmp_path_factory.mktemp("pyannote")
    torch.manual_seed(0)
    hearing_seldom = {"melkwargs": {"n_fft": 2048, "hop_length": RATE // 10}}
    embedding: Any = importlib.import_module("pyannote.audio.models.embedding")
    voices = embedding.XVectorMFCC(mfcc=hearing_seldom, dimension=EMBEDDING_SIZE)
    pyannote_checkpoint.write(folder, voices, EMBEDDING_SIZE, PLDA_SIZE)
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def tiny_settings(tiny_settings: dict[str, str], folder: Path) -> dict[str, str]:
    return tiny_settings | {"PYANNOTE_CHECKPOINT": str(folder)}


@pytest.fixture
def ask(asks: Callable[[str], Ask]) -> Ask:
    return asks("pyannote")


@pytest.fixture
def refused(build: Callable[..., Engine]) -> Callable[..., str]:
    """``refused(SETTING=value, ...)`` gives the error of a server whose model cannot be loaded with these settings."""

    def send(**settings: str) -> str:
        response = Ask(create_app(build(DEVICE="cpu", **settings)).test_client(), "pyannote").response(
            TASK, audio=ONE_TURN
        )
        assert response.status_code == 503
        return str(response.json["error"])

    return send


@pytest.mark.parametrize(
    ("name", "seconds", "config", "n"),
    [
        ("two_voices", 7.3, {}, None),
        ("two_voices", 7.3, {"num_speakers": 2}, 2),
        ("three_voices", 11, {"min_speakers": 3, "max_speakers": 3}, 3),
    ],
    ids=["as many as it finds", "two speakers", "three speakers"],
)
def test_segments_are_those_that_the_library_finds(
    ask: Ask, library: Any, folder: Path, name: str, seconds: float, config: dict[str, int], n: int | None
) -> None:
    import torch

    samples = speech(name, 0, seconds)
    pipeline = library.Pipeline.from_pretrained(folder)
    told = pipeline({"waveform": torch.from_numpy(samples)[None], "sample_rate": RATE}, **config).serialize()

    answer = ask(TASK, audio=encode(samples), config=config)

    expected = [(one["start"], min(one["end"], seconds)) for one in told["diarization"]]
    assert [(one["start"], one["end"]) for one in answer] == [pytest.approx(one, abs=2e-3) for one in expected]
    names = list(dict.fromkeys(one["speaker"] for one in told["diarization"]))
    assert [int(one["speaker"][-1]) for one in answer] == [names.index(one["speaker"]) for one in told["diarization"]]
    assert n is None or n_speakers(answer) == n


def test_passes_the_check(tiny_engine: Engine) -> None:
    assert check(tiny_engine, "pyannote", measured_seconds=0)["failures"] == []


def test_segments_of_a_batch_are_those_of_its_recordings_alone(ask: Ask) -> None:
    recordings = [
        encode(speech("two_voices", 0, 7.3)),
        ONE_TURN,
        encode(np.zeros(RATE, np.float32)),
        encode(speech("two_voices", 0, 4)[::2], RATE // 2),
    ]

    answers = ask(TASK, audio=recordings)

    assert answers == [ask(TASK, audio=one) for one in recordings]
    assert len({len(answer) for answer in answers}) == 3


@pytest.mark.parametrize("n", [1, RATE], ids=["one sample", "a second"])
@pytest.mark.parametrize("config", [{}, {"num_speakers": 2}, {"min_speakers": 2}], ids=str)
def test_nobody_speaks_in_silence(ask: Ask, n: int, config: dict[str, int]) -> None:
    assert ask(TASK, audio=encode(np.zeros(n, np.float32)), config=config) == []


def test_unknown_key_of_config_is_named(ask: Ask) -> None:
    response = ask.response(TASK, audio=ONE_TURN, config={"speakers": 2})

    assert response.status_code == 400
    assert response.json["field"] == "config.speakers"


def test_provenance_tells_the_folder(ask: Ask, tiny_engine: Engine, folder: Path) -> None:
    ask(TASK, audio=ONE_TURN)

    told = {"checkpoint": str(folder), "revision": "local", "dtype": "float32", "device": "cpu"}
    assert tiny_engine.status("pyannote")["provenance"] == told


def test_nothing_is_reported_to_the_library_s_makers(
    build: Callable[..., Engine], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics: Any = importlib.import_module("pyannote.audio.telemetry.metrics")
    monkeypatch.setenv("PYANNOTE_METRICS_ENABLED", "true")  # so that it is there again afterwards
    monkeypatch.delenv("PYANNOTE_METRICS_ENABLED")

    build(DEVICE="cpu", PYANNOTE_CHECKPOINT=str(folder)).start("pyannote", wait=True)

    assert not metrics.is_metrics_enabled()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: os.truncate(folder / "segmentation" / "pytorch_model.bin", 100_000), ""),
        (lambda folder: (folder / "config.yaml").unlink(), "config.yaml"),
        (lambda folder: (folder / "plda" / "plda.npz").unlink(), "plda.npz"),
        (lambda folder: write_config(folder, "VoiceActivityDetection"), "its pipeline is VoiceActivityDetection"),
    ],
    ids=["half a file", "no config", "no PLDA", "another pipeline"],
)
def test_checkpoint_that_is_broken_or_another_is_a_503(
    refused: Callable[..., str], copy: Path, damage: Callable[[Path], object], reason: str
) -> None:
    damage(copy)

    error = refused(PYANNOTE_CHECKPOINT=str(copy))

    assert f"PYANNOTE_CHECKPOINT={copy} is incomplete or broken: " in error
    assert reason in error


def test_default_checkpoint_without_a_hub_is_a_503_that_says_what_to_do(
    refused: Callable[..., str], library: Any
) -> None:
    assert "connect to the hub, or set PYANNOTE_CHECKPOINT to a folder" in refused()


def test_hub_that_wants_a_token_is_a_503_that_says_so_once_it_has_seen_the_one_that_is_set(
    refused: Callable[..., str], library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError

    shown: list[str | None] = []
    forbidden: Any = SimpleNamespace(headers={}, request=None)

    def model_info(self: HfApi, name: str, *, token: str | None, **arguments: Any) -> None:
        shown.append(token)
        raise GatedRepoError("gated", response=forbidden)

    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr(checkpoints, "_hub_can_be_reached", lambda: True)

    given = "hf_abc"

    error = refused(PYANNOTE_TOKEN=given)

    assert "it is gated; accept its conditions there" in error
    assert given not in error
    assert shown == [given]


@pytest.mark.parametrize("missing", ["pyannote.audio", "pyannote.audio.pipelines"])
def test_library_that_is_not_installed_is_a_503_that_points_to_the_readme(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)

    assert "the library pyannote.audio cannot be imported: " in refused()
