from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from feature_extraction_server.core.config import DiarizationConfig, check_config
from feature_extraction_server.core.errors import InvalidInput, ModelError
from feature_extraction_server.tasks.audio_diarization import task
from tests.media_files import encode, recording

TWO_SECONDS = encode(recording(np.zeros(16_000, np.float32)))


def run(*segments: tuple[float, float, Any]) -> Any:
    """Return the task's answer where a model finds these segments in a recording of two seconds."""
    found = [{"start": start, "end": end, "speaker": speaker} for start, end, speaker in segments]
    return task.wrap(lambda audio, config: [found])(audio=TWO_SECONDS)


def test_segments_are_in_order_of_start_and_speakers_numbered_as_they_come() -> None:
    answer = run((1.0, 1.5, "A"), (0.25, 0.75, "B"), (1.25, 1.75, "B"), (1.25, 1.5, "C"))

    assert answer == [
        {"start": 0.25, "end": 0.75, "speaker": "speaker_0"},
        {"start": 1.0, "end": 1.5, "speaker": "speaker_1"},
        {"start": 1.25, "end": 1.5, "speaker": "speaker_2"},
        {"start": 1.25, "end": 1.75, "speaker": "speaker_0"},
    ]


@pytest.mark.parametrize("speaker", [7, np.int64(7), "speaker_7"], ids=["number", "numpy's number", "like ours"])
def test_speaker_may_be_called_anything_by_the_model(speaker: Any) -> None:
    assert run((0, 1, speaker)) == [{"start": 0, "end": 1, "speaker": "speaker_0"}]


@pytest.mark.parametrize(
    ("told", "expected"),
    [((-0.5, 2.5), [(0, 2)]), ((0.12345, 0.98765), [(0.123, 0.988)]), ((2.0, 2.5), []), ((0.5, 0.5), [])],
    ids=["around", "long fractions", "behind", "empty"],
)
def test_segments_are_kept_within_the_recording(told: tuple[float, float], expected: list[tuple[float, float]]) -> None:
    answer = run((*told, 0))

    assert [(segment["start"], segment["end"]) for segment in answer] == expected


@pytest.mark.parametrize("times", [(1.5, 1.0), (0.0, float("nan"))], ids=["backwards", "not a number"])
def test_times_that_are_none_are_the_model_s_fault(times: tuple[float, float]) -> None:
    with pytest.raises(ModelError, match="breaks the task's contract"):
        run((*times, 0))


@pytest.mark.parametrize(
    ("config", "field", "words"),
    [
        ({"num_speakers": 0}, "config.num_speakers", "greater than or equal to 1"),
        ({"num_speakers": 101}, "config.num_speakers", "less than or equal to 100"),
        ({"num_speakers": 2.0}, "config.num_speakers", "integer"),
        ({"min_speakers": "two"}, "config.min_speakers", "integer"),
        ({"max_speakers": True}, "config.max_speakers", "integer"),
        ({"num_speakers": 2, "max_speakers": 3}, "config", "excludes"),
        ({"min_speakers": 3, "max_speakers": 2}, "config", "may not exceed"),
        ({"threshold": 0.5}, "config.threshold", "unknown key"),
    ],
    ids=str,
)
def test_what_config_may_not_hold_is_named(config: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as raised:
        check_config(DiarizationConfig, config)

    assert raised.value.field == field
