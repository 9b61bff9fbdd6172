"""Fixtures: servers whose models are the tiny checkpoints."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.setup import build_engine
from feature_extraction_server.flask.app import create_app
from tests.checkpoints import BUILDERS, checkpoint
from tests.plugins.asking import Ask


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a module that leaves a consumer thread; within one, the engine with the loaded models is shared."""
    yield
    give_up_at = time.monotonic() + 30
    while left := [thread for thread in threading.enumerate() if thread.name.startswith("consumer-")]:
        assert time.monotonic() < give_up_at, f"left behind: {left}"
        left[0].join(0.1)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Let torch use one thread, which is the fastest for models as small as these."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # else the models at work are given all cores
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="session")
def tiny_settings() -> dict[str, str]:
    """Settings that make every model load its tiny checkpoint."""
    any_order = random.sample(list(BUILDERS), len(BUILDERS))  # so that several processes share the building
    folders = {f"{name.upper()}_CHECKPOINT": str(checkpoint(name)) for name in any_order}
    # A process of its own would know the environment's settings alone.
    return folders | {"DEVICE": "cpu", "SHERPA_ONNX_CONSUMER_TYPE": "single_thread_consumer"}


@pytest.fixture(scope="module")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory, tiny_settings: dict[str, str]) -> Iterator[Engine]:
    """An engine whose models load the tiny checkpoints."""
    folder = tmp_path_factory.mktemp("engine")
    settings = tiny_settings | {"LOG_PATH": str(folder / "log.txt"), "STOP_GRACE_PERIOD": "5"}
    engine = build_engine(SettingsManager(settings, folder / ".env"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def asks(tiny_engine: Engine) -> Callable[[str], Ask]:
    """``asks(model)`` gives what asks a model over HTTP."""
    client = create_app(tiny_engine).test_client()
    return lambda model: Ask(client, model)


@pytest.fixture
def refuses(build: Callable[..., Engine], tiny_settings: dict[str, str]) -> Callable[..., str]:
    """``refuses(model, task, body, SETTING=value, ...)`` gives the error of a server that cannot load the model."""

    def send(model: str, task: str, body: dict[str, Any], **settings: str) -> str:
        ask = Ask(create_app(build(**tiny_settings | settings)).test_client(), model)
        response = ask.response(task, **body)
        assert response.status_code == 503
        return str(response.json["error"])

    return send
