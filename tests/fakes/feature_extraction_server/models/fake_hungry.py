"""A model in a process of its own that may have 256 MiB more than Python needs, and wants all there is for pictures
two pixels wide."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from PIL.Image import Image

consumer_type = "process_consumer"

MIB = 1 << 20


def load_model() -> None:
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 256 * MIB, resource.RLIM_INFINITY))


def image_captioning(image: list[Image], config: dict[str, Any]) -> list[list[str]]:
    eaten = []
    while any(picture.width == 2 for picture in image):
        eaten.append(bytearray(MIB))
    return [["fed"] for _ in image]
