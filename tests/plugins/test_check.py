"""Every model of this repository passes the check for people who write plugins, which finds what models get wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from feature_extraction_server.core import check as checking
from feature_extraction_server.core import detections
from feature_extraction_server.core.check import Report, card, check, main, rate
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.errors import ModelLoadFailed, ModelNotFound
from tests.checkpoints import BUILDERS
from tests.plugins.test_contracts import FOLDERS, kind_and_name

MODELS = [name for kind, name in map(kind_and_name, FOLDERS) if kind == "models"]

GOOD = """
from feature_extraction_server.core.config import EmbeddingConfig

config_types = {"text_embedding": EmbeddingConfig}


def load_model():
    global scale
    scale = 2.0


def text_embedding(text, config):
    return [[scale * len(one), *[float(ord(one[0]))] * 8] for one in text]
"""
ANSWER = "    return [[scale * len(one), *[float(ord(one[0]))] * 8] for one in text]"
DEFECTS = {
    "order is mixed up": (
        {ANSWER: "    return [[scale * len(one)] for one in sorted(text)]"},
        "text_embedding: the order is not kept: the batch's answer ",
    ),
    "batch differs from single": (
        {ANSWER: "    return [[scale * len(one), float(len(text))] for one in text]"},
        "text_embedding: input 0 gets another answer in a batch than alone: 1.0 alone, 4.0 there[1]",
    ),
    "batch differs a little": (
        {ANSWER: "    return [[0.5 + 0.001 * len(text), scale * len(one)] for one in text]"},
        "text_embedding: input 0 gets another answer in a batch than alone: 0.501 alone, 0.504 there[0]",
    ),
    "too few answers": (
        {ANSWER: "    return [[scale * len(one)] for one in text[:3]]"},
        "text_embedding: ",
    ),
    "not what the task promises": (
        {ANSWER: "    return [[scale * len(one), float('nan')] for one in text]"},
        "text_embedding: the model's result breaks the task's contract: ",
    ),
    "raises": ({ANSWER: "    raise ValueError('no such word')"}, "no such word"),
    "answers differ after a restart": (
        {
            "def load_model": "starts = []\n\n\ndef load_model",
            "    scale = 2.0": "    starts.append(1); scale = len(starts)",
        },
        "text_embedding: after a stop and a start, the same input gets another answer: ",
    ),
    "memory is kept": (
        {
            "def load_model": "kept = []\n\n\ndef load_model",
            "    scale = 2.0": "    scale = 2.0; kept.append(b'1' * 80_000_000)",
        },
        "it keeps memory when it is stopped: ",
    ),
}


@pytest.fixture
def check_source(plugin: Callable[[str, str, str], None], build: Callable[..., Engine]) -> Callable[[str], Report]:
    """``check_source(source)`` checks a model plugin that is written for one test."""

    def run(source: str) -> Report:
        plugin("models", "checked", source)
        return check(build(), "checked", measured_seconds=0)

    return run


@pytest.mark.parametrize("model", MODELS)
def test_model_passes(tiny_engine: Engine, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "BATCH_ITEMS", 2)  # to tell the speed by, which is not looked at here
    monkeypatch.setattr(detections, "COCO_CLASSES", detections.COCO_CLASSES[:3])  # all 80 take as many times as long
    try:
        report = check(tiny_engine, model, measured_seconds=0)
    except ModelLoadFailed as error:
        if model in BUILDERS:
            raise
        pytest.skip(f"its weights or its library are not here: {error.message}")
    except ModelNotFound as error:
        pytest.skip(f"its plugin is left out: {error.message}")

    assert report["failures"] == []
    assert report["tasks"].keys() == set(tiny_engine.tasks_of(model))
    assert all(told["samples"] and told["batch_items_per_second"] for told in report["tasks"].values())


@pytest.mark.parametrize(("changes", "sentence"), DEFECTS.values(), ids=DEFECTS.keys())
def test_defect_is_told(check_source: Callable[[str], Report], changes: dict[str, str], sentence: str) -> None:
    source = GOOD
    for right, wrong in changes.items():
        assert right in source
        source = source.replace(right, wrong)

    (failure,) = check_source(source)["failures"]

    assert sentence in failure


def test_card_tells_the_vectors_and_that_all_is_well(check_source: Callable[[str], Report]) -> None:
    told = card(check_source(GOOD))

    assert "text_embedding: 4 different answers to 4 samples" in told
    assert "vectors of 9 numbers, not normalised" in told
    assert "everything holds" in told


def test_card_has_a_line_for_each_failure(check_source: Callable[[str], Report]) -> None:
    report = check_source(GOOD.replace(ANSWER, "    raise ValueError('no such word')"))

    assert "FAILED text_embedding: " in card(report)
    assert "everything holds" not in card(report)


def test_model_s_own_samples_are_taken(check_source: Callable[[str], Report]) -> None:
    own = 'samples = {"text_embedding": [{"text": "one"}, {"text": "two words"}]}\n'

    report = check_source(own + GOOD)

    assert report["tasks"]["text_embedding"]["samples"] == 2


@pytest.mark.parametrize(
    ("call_s", "seconds", "calls"),
    [(1, 3, [0, 0, 1, 2]), (100, 3, [0]), (1, 0, [0])],
    ids=["first call does not count", "but a long one does", "one call alone is wanted"],
)
def test_speed_is_what_calls_take(
    monkeypatch: pytest.MonkeyPatch, call_s: float, seconds: float, calls: list[int]
) -> None:
    made: list[int] = []
    monkeypatch.setattr(checking, "time", SimpleNamespace(monotonic=lambda: len(made) * call_s))

    assert rate(made.append, 8, seconds) == 8 / call_s
    assert made == calls


@pytest.mark.parametrize(
    ("source", "status", "stream", "sentence"),
    [
        (GOOD, 0, "out", "everything holds"),
        (GOOD.replace(ANSWER, "    raise ValueError('no such word')"), 1, "out", "FAILED text_embedding"),
        (GOOD.replace("    scale = 2.0", "    raise OSError('no weights')"), 1, "err", "no weights"),
    ],
    ids=["good", "wrong", "does not load"],
)
def test_command_s_exit_status_says_whether_all_is_well(
    plugin: Callable[[str, str, str], None],
    build: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    source: str,
    status: int,
    stream: str,
    sentence: str,
) -> None:
    plugin("models", "checked", source)
    monkeypatch.setattr(checking, "build_engine", lambda settings, kinds: build())

    assert main(["checked", "--seconds", "0"]) == status
    assert sentence in getattr(capsys.readouterr(), stream)
