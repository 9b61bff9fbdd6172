from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from feature_extraction_server.core.errors import ModelError
from feature_extraction_server.core.media import Audio
from feature_extraction_server.tasks.automated_speech_recognition import task, with_times_if_asked_for
from tests.media_files import encode, recording

TWO_SECONDS = Audio(np.zeros(16_000, np.float32), 8_000)


def transcript(*times: tuple[float, float]) -> dict[str, Any]:
    return {"text": "a", "language": "en", "segments": [{"start": s, "end": e, "text": "a"} for s, e in times]}


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ((0.25, 1.5), (0.25, 1.5)),
        ((-0.1, 2.5), (0, 2)),
        ((1.5, 1.25), (1.5, 1.5)),
        ((3.0, 4.0), (2, 2)),
        ((0.33333, 0.66666), (0.333, 0.667)),
    ],
    ids=["within", "around", "backwards", "behind", "long fractions"],
)
def test_times_are_kept_within_the_recording(told: tuple[float, float], expected: tuple[float, float]) -> None:
    answer = with_times_if_asked_for(transcript(told), {"audio": TWO_SECONDS, "config": {"timestamps": "segments"}})

    assert (answer["segments"][0]["start"], answer["segments"][0]["end"]) == expected
    assert answer["duration"] == 2


@pytest.mark.parametrize(
    ("config", "answer", "words"),
    [
        ({}, transcript((0, 1)), "which were not asked for"),
        ({"timestamps": "segments"}, "a", "lacks the times of the segments"),
        ({"timestamps": "words"}, transcript((0, 1)), "lacks the times of the words"),
        ({"timestamps": "segments"}, {"text": "a", "language": None, "segments": [{"text": "a"}]}, "contract"),
        ({"timestamps": "segments"}, transcript((0, float("nan"))), "contract"),
    ],
    ids=["times unasked for", "no times", "no words", "a segment without times", "not a number"],
)
def test_answer_of_another_form_is_the_model_s_fault(config: dict[str, Any], answer: Any, words: str) -> None:
    run = task.wrap(lambda audio, config: [answer])

    with pytest.raises(ModelError, match=words):
        run(audio=encode(recording(np.zeros(16_000, np.float32))), config=config)
