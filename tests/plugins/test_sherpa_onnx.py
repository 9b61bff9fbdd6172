from __future__ import annotations

import importlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from demo import speaker_weights
from dev_server import ROOT
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.flask.app import create_app
from tests.checkpoints import checkpoint
from tests.plugins.asking import Ask
from tests.plugins.hearing import RATE, encode, in_base64

TASK = "audio_diarization"
SPEECH = ROOT / "tests" / "speech"
FRAMES_PER_S = 100


def speech(name: str, begin_s: float = 0, end_s: float | None = None) -> Any:
    samples, rate = soundfile.read(SPEECH / f"{name}.ogg", dtype="float32")
    assert rate == RATE
    return samples[int(begin_s * RATE) : None if end_s is None else int(end_s * RATE)]


TWO_TURNS = encode(speech("two_voices", 0, 7.3))
ONE_TURN = encode(speech("two_voices", 4, 7.3))


def error_rate(spoken: list[dict[str, Any]], found: list[dict[str, Any]]) -> float:
    """Return the diarization error rate: missed, wrong and mistaken speech as a part of what is spoken.

    It is counted in frames, nothing at the edges of turns forgiven, with the names that fit best.
    """
    n_frames = round(FRAMES_PER_S * max(turn["end"] for turn in [*spoken, *found]))

    def frames(turns: list[dict[str, Any]]) -> dict[str, Any]:
        told = {turn["speaker"]: np.zeros(n_frames, bool) for turn in turns}
        for turn in turns:
            told[turn["speaker"]][round(turn["start"] * FRAMES_PER_S) : round(turn["end"] * FRAMES_PER_S)] = True
        return told

    truth, heard = frames(spoken), frames(found)
    names = [*heard, *[None] * len(truth)]
    n_right = max(
        sum(int((truth[name] & heard[other]).sum()) for name, other in zip(truth, chosen, strict=True) if other)
        for chosen in itertools.permutations(names, len(truth))
    )
    n_spoken, n_heard = (np.sum(list(told.values()), axis=0) for told in (truth, heard))
    return float((np.maximum(n_spoken, n_heard).sum() - n_right) / n_spoken.sum())


def n_speakers(segments: list[dict[str, Any]]) -> int:
    return len({segment["speaker"] for segment in segments})


@pytest.fixture
def ask(asks: Callable[[str], Ask]) -> Ask:
    return asks("sherpa_onnx")


@pytest.fixture(scope="module")
def direct() -> Callable[..., list[tuple[float, float, int]]]:
    """``direct(samples, n_speakers)`` gives the segments that the library alone finds."""
    library: Any = importlib.import_module("sherpa_onnx")
    segmentation = str(checkpoint("sherpa_onnx") / speaker_weights.SEGMENTATION_FILE)
    embedding = str(checkpoint("sherpa_onnx_embedding") / speaker_weights.EMBEDDING_FILE)

    def find(samples: Any, n_speakers: int = -1) -> list[tuple[float, float, int]]:
        config = library.OfflineSpeakerDiarizationConfig(
            segmentation=library.OfflineSpeakerSegmentationModelConfig(
                pyannote=library.OfflineSpeakerSegmentationPyannoteModelConfig(model=segmentation)
            ),
            embedding=library.SpeakerEmbeddingExtractorConfig(model=embedding),
            clustering=library.FastClusteringConfig(num_clusters=n_speakers),
        )
        found = library.OfflineSpeakerDiarization(config).process(samples).sort_by_start_time()
        return [(one.start, one.end, one.speaker) for one in found]

    return find


@pytest.mark.parametrize(
    ("name", "seconds", "n"),
    [("two_voices", 7.3, None), ("three_voices", 11, 2), ("three_voices", 11, 3)],
    ids=["as many as it finds", "two speakers", "three speakers"],
)
def test_segments_are_those_that_the_library_finds(
    ask: Ask, direct: Callable[..., list[tuple[float, float, int]]], name: str, seconds: float, n: int | None
) -> None:
    samples = speech(name, 0, seconds)
    padding = 12 * RATE - len(samples) if n else 0
    expected = direct(np.pad(samples, (0, padding)), n or -1)

    answer = ask(TASK, audio=encode(samples), config={"num_speakers": n} if n else {})

    times = [(start, min(end, seconds)) for start, end, _ in expected]
    assert [(one["start"], one["end"]) for one in answer] == [pytest.approx(one, abs=1e-3) for one in times]
    assert n_speakers(answer) == len({speaker for _, _, speaker in expected}) == (n or 2)


@pytest.mark.weights
@pytest.mark.parametrize("name", ["two_voices", "three_voices"])
def test_at_most_a_tenth_of_the_speech_is_given_to_the_wrong_speaker(ask: Ask, name: str) -> None:
    spoken = json.loads((SPEECH / f"{name}.json").read_text())

    answer = ask(TASK, audio=in_base64(SPEECH / f"{name}.ogg"))

    assert error_rate(spoken, answer) <= 0.1
    assert n_speakers(answer) == n_speakers(spoken)


def test_error_rate_counts_what_is_missed_wrong_and_mistaken() -> None:
    spoken = [{"start": 0, "end": 2, "speaker": "a"}, {"start": 2, "end": 4, "speaker": "b"}]
    found = [{"start": 1, "end": 3, "speaker": "x"}, {"start": 3, "end": 5, "speaker": "y"}]

    assert error_rate(spoken, found) == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    ("config", "n"),
    [({}, 1), ({"min_speakers": 3}, 3), ({"min_speakers": 1, "max_speakers": 5}, 1)],
    ids=str,
)
def test_least_number_of_speakers_matters_where_fewer_are_found(ask: Ask, config: dict[str, int], n: int) -> None:
    assert n_speakers(ask(TASK, audio=encode(speech("three_voices", 0, 11)), config=config)) == n


@pytest.mark.parametrize(("config", "n"), [({"max_speakers": 1}, 1), ({"max_speakers": 5}, 2)], ids=str)
def test_largest_number_of_speakers_matters_where_more_are_found(ask: Ask, config: dict[str, int], n: int) -> None:
    assert n_speakers(ask(TASK, audio=TWO_TURNS, config=config)) == n


def test_segments_of_a_batch_are_those_of_its_recordings_alone(ask: Ask) -> None:
    recordings = [
        ONE_TURN,
        TWO_TURNS,
        encode(np.zeros(RATE, np.float32)),
        encode(speech("two_voices", 0, 4)[::2], RATE // 2),
    ]

    answers = ask(TASK, audio=recordings)

    assert answers == [ask(TASK, audio=one) for one in recordings]
    assert [n_speakers(answer) for answer in answers] == [1, 2, 0, 1]


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros(3 * RATE, np.float32),
        0.01 * np.random.default_rng(0).normal(size=3 * RATE).astype(np.float32),
        np.ones(1, np.float32),
    ],
    ids=["silence", "noise", "one sample"],
)
@pytest.mark.parametrize("config", [{}, {"num_speakers": 2}, {"min_speakers": 2}], ids=str)
def test_nobody_speaks_where_there_is_no_speech(ask: Ask, samples: Any, config: dict[str, int]) -> None:
    assert ask(TASK, audio=encode(samples), config=config) == []


def test_unknown_key_of_config_is_named(ask: Ask) -> None:
    response = ask.response(TASK, audio=TWO_TURNS, config={"speakers": 2})

    assert response.status_code == 400
    assert response.json["field"] == "config.speakers"


@pytest.fixture
def refused(refuses: Callable[..., str]) -> Callable[..., str]:
    return partial(refuses, "sherpa_onnx", TASK, {"audio": ONE_TURN})


@pytest.mark.parametrize("name", ["sherpa_onnx", "sherpa_onnx_embedding"])
@pytest.mark.parametrize("damage", ["half", "empty folder", "another model's"])
def test_checkpoint_that_is_broken_or_another_is_a_503(
    refused: Callable[..., str], tmp_path: Path, name: str, damage: str
) -> None:
    other = {"sherpa_onnx": "sherpa_onnx_embedding", "sherpa_onnx_embedding": "sherpa_onnx"}[name]
    folder = Path(shutil.copytree(checkpoint(other if damage == "another model's" else name), tmp_path / "checkpoint"))
    (file,) = folder.glob("*.onnx")
    if damage == "half":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "empty folder":
        file.unlink()

    error = refused(**{f"{name.upper()}_CHECKPOINT": str(folder)})

    assert f"{name.upper()}_CHECKPOINT={folder} is incomplete or broken" in error


def test_file_of_another_name_is_taken_where_it_is_the_only_one(
    build: Callable[..., Engine], tiny_settings: dict[str, str], tmp_path: Path
) -> None:
    (file,) = checkpoint("sherpa_onnx_embedding").glob("*.onnx")
    shutil.copy(file, tmp_path / "voices.onnx")
    settings = tiny_settings | {"SHERPA_ONNX_EMBEDDING_CHECKPOINT": str(tmp_path)}

    answer = Ask(create_app(build(**settings)).test_client(), "sherpa_onnx")(TASK, audio=ONE_TURN)

    assert n_speakers(answer) == 1


def test_provenance_names_both_checkpoints(ask: Ask, tiny_engine: Engine) -> None:
    ask(TASK, audio=ONE_TURN)

    assert tiny_engine.status("sherpa_onnx")["provenance"] == {
        "checkpoint": f"{checkpoint('sherpa_onnx')}, {checkpoint('sherpa_onnx_embedding')}",
        "revision": "local",
        "dtype": "float32",
        "device": "cpu",
    }
