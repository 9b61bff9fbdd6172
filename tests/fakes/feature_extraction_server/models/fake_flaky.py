"""A model that fails on pictures whose width is a multiple of seven, and takes 10 ms a call."""

from __future__ import annotations

import time
from typing import Any

from PIL.Image import Image


def load_model() -> None:
    time.sleep(0.05)


def image_captioning(image: list[Image], config: dict[str, Any]) -> list[list[str]]:
    time.sleep(0.01)
    unlucky = [picture.width for picture in image if picture.width % 7 == 0]
    if unlucky:
        raise RuntimeError(f"unlucky width {unlucky[0]}")
    return [[f"lucky width {picture.width}"] for picture in image]
