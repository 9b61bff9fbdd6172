"""A model that takes FAKE_SECONDS a call, fails on pictures one pixel wide, and tells how it was called.

A caption is "<width> in a batch of <n>, call <k>, load <l>".
"""

from __future__ import annotations

import time
from typing import Any

from PIL.Image import Image

from feature_extraction_server.core.settings import Setting, SettingsManager

n_calls = 0
seconds: Setting[float]
load_seconds: Setting[float]


def add_settings(settings_manager: SettingsManager) -> None:
    global seconds, load_seconds
    seconds = settings_manager.add_setting(
        name="FAKE_SECONDS", type=float, default=0.05, description="How long a call takes"
    )
    load_seconds = settings_manager.add_setting(
        name="FAKE_LOAD_SECONDS", type=float, default=0.1, description="How long loading takes"
    )


def load_model() -> None:
    time.sleep(load_seconds.get())
    vars(load_counter)["n"] = vars(load_counter).get("n", 0) + 1


def load_counter() -> int:
    """Count in a place that stopping the model does not reset."""
    n: int = vars(load_counter)["n"]
    return n


def image_captioning(image: list[Image], config: dict[str, Any]) -> list[list[str]]:
    global n_calls
    n_calls += 1
    time.sleep(seconds.get())
    if any(picture.width == 1 for picture in image):
        raise RuntimeError("one pixel wide")
    return [[f"{p.width} in a batch of {len(image)}, call {n_calls}, load {load_counter()}"] for p in image]
