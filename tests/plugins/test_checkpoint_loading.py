from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.errors import ModelLoadFailed
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.flask.app import create_app
from tests import checkpoints as tiny
from tests.conftest import Server, encode_image
from tests.plugins.asking import draw

# What each model is asked.
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "blip": ("image_captioning", {}),
    "blip2": ("image_captioning", {}),
    "vit_gpt2": ("image_captioning", {}),
    "clip_vit_large_patch14": ("zero_shot_image_classification", {"classes": ["a cat", "a dog"]}),
    "owlvit_base_patch32": ("object_detection", {"config": {"threshold": 0}}),
    "vit_base_patch16_224": ("image_classification", {}),
    "detr_resnet101": ("object_detection", {"config": {"threshold": 0}}),
    "grounding_dino_tiny": ("zero_shot_object_detection", {"classes": ["a cat", "a dog"], "config": {"threshold": 0}}),
    "siglip2_base_patch16_224": ("zero_shot_image_classification", {"classes": ["a cat", "a dog"]}),
    "dino_v2_vits14": ("image_embedding", {}),
    "multilingual_e5_base": ("text_embedding", {"text": "a cat"}),
    "e5mistral7b_instruct": ("text_embedding", {"text": "a cat"}),
}
PICTURE = encode_image(draw(0))


@pytest.fixture
def serve(build: Callable[..., Engine], tiny_settings: dict[str, str]) -> Callable[..., FlaskClient]:
    """``serve(SETTING=value, ...)`` gives a client of a server whose models are tiny, but for these settings."""
    return lambda **settings: create_app(build(**tiny_settings | {"LOAD_RETRY_DELAY": "0"} | settings)).test_client()


def ask(client: FlaskClient, model: str) -> Any:
    task, body = REQUESTS[model]
    medium = {} if "text" in body else {"image": PICTURE}
    return client.post(f"/api/models/{model}/tasks/{task}/features", json=body | medium)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    """``copy(model)`` gives a copy of a tiny checkpoint, to be damaged."""
    return lambda model: Path(shutil.copytree(tiny.checkpoint(model), tmp_path / model))


def edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("model", REQUESTS)
def test_folder_that_does_not_exist_is_named_in_a_503(serve: Callable[..., FlaskClient], model: str) -> None:
    setting = f"{model.upper()}_CHECKPOINT"

    response = ask(serve(**{setting: "/no/such/folder"}), model)

    assert response.status_code == 503
    assert response.json["code"] == "model_load_failed"
    assert f"{setting}=/no/such/folder does not exist" in response.json["error"]


@pytest.mark.parametrize("model", REQUESTS)
def test_default_checkpoint_without_a_hub_is_a_503_that_says_what_to_do(
    serve: Callable[..., FlaskClient], tiny_settings: dict[str, str], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(tiny_settings, setting := f"{model.upper()}_CHECKPOINT")

    response = ask(serve(), model)

    assert response.status_code == 503
    assert f"connect to the hub, or set {setting} to a folder" in response.json["error"]


@pytest.mark.parametrize("model", REQUESTS)
def test_checkpoint_without_weights_is_a_503(
    serve: Callable[..., FlaskClient], copy: Callable[[str], Path], model: str
) -> None:
    folder = copy(model)
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        path.unlink()

    response = ask(serve(**{f"{model.upper()}_CHECKPOINT": str(folder)}), model)

    assert response.status_code == 503
    assert f"{folder} is incomplete or broken" in response.json["error"]


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("blip", "model.safetensors"),
        ("vit_gpt2", "pytorch_model.bin"),
        ("blip", "config.json"),
        ("blip", "preprocessor_config.json"),
        ("blip", "tokenizer.json"),
    ],
)
def test_checkpoint_with_half_a_file_is_a_503_and_loads_once_it_is_whole(
    serve: Callable[..., FlaskClient], copy: Callable[[str], Path], model: str, file: str
) -> None:
    folder = copy(model)
    truncate(folder / file)
    client = serve(**{f"{model.upper()}_CHECKPOINT": str(folder)})

    response = ask(client, model)
    shutil.copy(tiny.checkpoint(model) / file, folder / file)

    assert response.status_code == 503
    assert f"{folder} is incomplete or broken" in response.json["error"]
    assert ask(client, model).status_code == 200


def test_checkpoint_of_another_model_is_a_503_and_not_random_weights(serve: Callable[..., FlaskClient]) -> None:
    folder = tiny.checkpoint("clip_vit_large_patch14")

    response = ask(serve(BLIP_CHECKPOINT=str(folder)), "blip")

    assert response.status_code == 503
    assert f"BLIP_CHECKPOINT={folder}" in response.json["error"]


def test_checkpoint_that_lacks_some_weights_is_a_503(
    serve: Callable[..., FlaskClient], copy: Callable[[str], Path]
) -> None:
    from safetensors.torch import load_file, save_file

    file = (folder := copy("blip")) / "model.safetensors"
    weights = load_file(file)
    del weights["vision_model.post_layernorm.weight"]
    save_file(weights, file, metadata={"format": "pt"})

    response = ask(serve(BLIP_CHECKPOINT=str(folder)), "blip")

    assert response.status_code == 503
    assert "vision_model.post_layernorm.weight" in response.json["error"]


def test_device_that_is_not_there_is_a_503(serve: Callable[..., FlaskClient]) -> None:
    response = ask(serve(DEVICE="cuda:99"), "blip")

    assert response.status_code == 503
    assert "DEVICE=cuda:99" in response.json["error"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("model", REQUESTS)
def test_model_answers_in_half_precision(serve: Callable[..., FlaskClient], model: str, dtype: str) -> None:
    response = ask(serve(DTYPE=dtype), model)

    assert response.status_code == 200
    loaded = sys.modules[f"feature_extraction_server.models.{model}"].model
    assert dtype in {str(parameter.dtype).removeprefix("torch.") for parameter in loaded.parameters()}


@pytest.mark.parametrize("model", REQUESTS)
def test_stopped_model_keeps_nothing_of_what_it_loaded(
    serve: Callable[..., FlaskClient], build: Callable[..., Engine], tiny_settings: dict[str, str], model: str
) -> None:
    engine = build(**tiny_settings)
    client = create_app(engine).test_client()
    first = ask(client, model).json
    module = sys.modules[f"feature_extraction_server.models.{model}"]
    parts = ("model", "image_processor", "tokenizer", "encoder")
    loaded = [weakref.ref(getattr(module, part)) for part in parts if hasattr(module, part)]

    engine.stop(model, wait=True)
    gc.collect()

    assert [reference() for reference in loaded] == [None] * len(loaded)
    assert ask(client, model).json == first


def test_blip2_checkpoint_saved_before_the_image_had_a_token_gives_the_same_captions(
    build: Callable[..., Engine], tiny_settings: dict[str, str], copy: Callable[[str], Path]
) -> None:
    new = build(**tiny_settings)
    expected = ask(create_app(new).test_client(), "blip2").json
    new.close()
    folder = copy("blip2")
    edit(folder / "config.json", lambda config: config | {"image_token_index": None})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        edit(folder / name, without_image_token)
    (folder / "processor_config.json").unlink()

    response = ask(create_app(build(BLIP2_CHECKPOINT=str(folder))).test_client(), "blip2")

    assert response.json == expected


def test_checkpoint_s_own_max_length_does_not_cut_captions(
    build: Callable[..., Engine], tiny_settings: dict[str, str], copy: Callable[[str], Path]
) -> None:
    plain = build(**tiny_settings)
    expected = ask(create_app(plain).test_client(), "vit_gpt2").json
    plain.close()
    folder = copy("vit_gpt2")
    edit(folder / "generation_config.json", lambda config: config | {"max_length": 8, "_from_model_config": False})

    response = ask(create_app(build(VIT_GPT2_CHECKPOINT=str(folder))).test_client(), "vit_gpt2")

    assert response.json == expected
    assert sys.modules["feature_extraction_server.models.vit_gpt2"].model.generation_config.max_length is None


def without_image_token(content: dict[str, Any]) -> dict[str, Any]:
    tokens = [token for token in content.get("added_tokens", []) if token["content"] != "<image>"]
    return {key: tokens if key == "added_tokens" else value for key, value in content.items()}


class Broken:
    """In the place of one of transformers' classes: fails to load."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def from_pretrained(self, folder: str, **arguments: Any) -> None:
        raise self._error


@pytest.fixture
def hub_checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(SettingsManager({}, tmp_path / ".env"), "some", "owner/name")


def test_memory_that_runs_out_is_not_called_a_broken_checkpoint(
    hub_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(hub_checkpoint, "download", Path)

    with pytest.raises(torch.OutOfMemoryError):
        hub_checkpoint.load_processor(Broken(torch.OutOfMemoryError("out of memory")))


def test_error_is_one_sentence_though_transformers_writes_many(
    hub_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_checkpoint, "download", Path)

    with pytest.raises(ModelLoadFailed) as raised:
        hub_checkpoint.load_processor(Broken(OSError("\nWe could not connect.\nRead on at some place.")))

    assert "We could not connect" in raised.value.message
    assert "Read on" not in raised.value.message
    assert "SOME_CHECKPOINT=owner/name" in raised.value.message


@pytest.mark.process
def test_model_behind_gunicorn_gives_the_answer_of_one_in_this_process(
    gunicorn: Callable[..., Server], serve: Callable[..., FlaskClient], tiny_settings: dict[str, str]
) -> None:
    expected = ask(serve(), "clip_vit_large_patch14").json
    task, body = REQUESTS["clip_vit_large_patch14"]
    server = gunicorn("--preload", **tiny_settings)

    response = server.post(f"/api/models/clip_vit_large_patch14/tasks/{task}/features", body | {"image": PICTURE})

    assert response.json() == pytest.approx(expected, abs=1e-5)
