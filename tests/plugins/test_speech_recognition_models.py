"""Whisper in both libraries: what holds for either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.plugins.asking import Ask
from tests.plugins.hearing import RATE, encode, noise

TASK = "automated_speech_recognition"
MODELS = ["whisper", "faster_whisper"]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *(
        (model, config, f"config.{next(iter(config))}")
        for model in MODELS
        for config in (
            {"language": "klingon"},
            {"language": 1},
            {"task": "sing"},
            {"timestamps": "letters"},
            {"timestamps": True},
            {"max_new_tokens": 441},
            {"temperature": 1e-40},
        )
    ),
    ("whisper", {"return_timestamps": True}, "config.return_timestamps"),
    ("whisper", {"temperature": 0}, "config.temperature"),
    ("whisper", {"prompt_ids": [1]}, "config.prompt_ids"),
    ("faster_whisper", {"language": "de"}, "config.language"),  # its checkpoint knows English only
    ("faster_whisper", {"task": "translate"}, "config.task"),
    ("faster_whisper", {"vad_filter": "yes"}, "config.vad_filter"),
    ("faster_whisper", {"initial_prompt": "hello"}, "config.initial_prompt"),
]


@pytest.mark.parametrize(
    ("model", "seconds", "n_texts"),
    [
        ("whisper", (0.5, 31, 0, 2, 0.05, 65, 5), 6),  # it hears windows of several recordings at once
        ("faster_whisper", (0.5, 2, 0, 0.05, 3), 3),
    ],
    ids=MODELS,
)
def test_texts_of_a_batch_are_those_of_its_recordings_alone(
    asks: Callable[[str], Ask], model: str, seconds: tuple[float, ...], n_texts: int
) -> None:
    silence = np.zeros(RATE, np.float32)
    recordings = [encode(noise(seed, length) if length else silence) for seed, length in enumerate(seconds)]
    config = {"max_new_tokens": 20}

    answers = asks(model)(TASK, audio=recordings, config=config)

    assert answers == [asks(model)(TASK, audio=recording, config=config) for recording in recordings]
    assert len(set(answers)) == n_texts


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "samples",
    [np.zeros(100 * RATE, np.float32), np.full(RATE, 1e-4, np.float32), np.ones(1, np.float32), noise(0, 0.09)],
    ids=["silence", "almost silence", "one sample", "too short"],
)
def test_silence_has_no_text(asks: Callable[[str], Ask], model: str, samples: Any) -> None:
    text = asks(model)(TASK, audio=encode(samples))
    transcript = asks(model)(TASK, audio=encode(samples), config={"timestamps": "words"})

    assert text == ""
    seconds = round(len(samples) / RATE, 3)
    assert transcript == {"text": "", "language": None, "segments": [], "words": [], "duration": seconds}


@pytest.mark.parametrize(("model", "config", "field"), REFUSED, ids=str)
def test_what_config_may_not_hold_is_named(
    asks: Callable[[str], Ask], model: str, config: dict[str, Any], field: str
) -> None:
    response = asks(model).response(TASK, audio=encode(noise(0)), config=config)

    assert response.status_code == 400
    assert response.json["field"] == field


@pytest.mark.parametrize("model", MODELS)
def test_beams_are_refused_where_chance_would_ignore_them(asks: Callable[[str], Ask], model: str) -> None:
    config = {"num_beams": 2, "temperature": 0.5}

    response = asks(model).response(TASK, audio=encode(noise(0)), config=config)

    assert response.status_code == 400
    assert "num_beams has no effect unless temperature is left out" in response.json["error"]


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("whisper", {"num_beams": 1, "temperature": 0.5}),
        ("faster_whisper", {"num_beams": 1, "temperature": 0.5}),
        ("faster_whisper", {"num_beams": 2, "temperature": 0}),
    ],
    ids=str,
)
def test_one_beam_goes_with_chance_and_more_without(
    asks: Callable[[str], Ask], model: str, config: dict[str, Any]
) -> None:
    limit = {"max_new_tokens": 4, "language": "en"}

    response = asks(model).response(TASK, audio=encode(noise(0)), config=limit | config)

    assert response.status_code == 200
