"""A model of 1 GB, half of it in large blocks and half in small ones."""

from __future__ import annotations

from typing import Any

from PIL.Image import Image

MIB = 1 << 20

large: list[bytearray]
small: list[bytearray]


def load_model() -> None:
    global large, small
    large = [bytearray(b"w") * (64 * MIB) for _ in range(8)]
    small = [bytearray(b"w") * 4096 for _ in range(512 * MIB // 4096)]


def image_captioning(image: list[Image], config: dict[str, Any]) -> list[list[str]]:
    return [[f"{sum(map(len, large + small)) // MIB} MiB"] for _ in image]
