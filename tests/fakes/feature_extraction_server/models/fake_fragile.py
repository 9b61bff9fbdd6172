"""A model in a process of its own, whose picture's width decides how it ends: see ``image_captioning``."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Any

from PIL.Image import Image

consumer_type = "process_consumer"


def load_model() -> None:
    if os.environ.get("FAKE_FRAGILE_FAILS"):
        raise RuntimeError("no weights here")
    if os.environ.get("FAKE_FRAGILE_DIES"):
        os._exit(7)


def image_captioning(image: list[Image], config: dict[str, Any]) -> list[list[str]]:
    widths = {picture.width for picture in image}
    if 2 in widths:
        os._exit(3)
    if 3 in widths:
        ctypes.string_at(0)  # a segmentation fault
    if 4 in widths:
        time.sleep(3600)
    if 5 in widths:
        raise ValueError("five pixels wide")
    if 6 in widths:
        sys.exit("six pixels wide")
    if 7 in widths:
        time.sleep(0.5)
    return [[f"width {picture.width} in process {os.getpid()}"] for picture in image]
