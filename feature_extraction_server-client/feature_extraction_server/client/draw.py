"""Boxes drawn over a picture. Needs Pillow, which the extra ``draw`` installs."""

from __future__ import annotations

import colorsys
import io
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps


def draw_detections(picture: bytes, detections: Mapping[str, Any], target: Path) -> None:
    """Draw boxes with labels and scores over a picture, and write it to a file whose suffix tells the format.

    Raises:
        OSError: the picture cannot be read, or the file not written.
        ValueError: the suffix is of no known format.
    """
    # As the server sees it: the boxes are in pixels of the upright picture.
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(picture))).convert("RGB")
    canvas = ImageDraw.Draw(image)
    line_px = max(2, min(image.size) // 200)
    font = ImageFont.load_default(size=max(12, min(image.size) // 30))
    for box, label, score in zip(detections["boxes"], detections["labels"], detections["scores"], strict=True):
        color = _color(label)
        canvas.rectangle(tuple(box), outline=color, width=line_px)
        text = f"{label} {score:.0%}"
        _, _, right, bottom = canvas.textbbox((0, 0), text, font=font)
        x = max(0.0, min(box[0], image.width - right))
        y = max(0.0, box[1] - bottom - line_px)
        canvas.rectangle((x, y, x + right + line_px, y + bottom + line_px), fill=color)
        canvas.text((x + line_px / 2, y), text, fill="white", font=font)
    image.save(target)


def _color(label: str) -> tuple[int, int, int]:
    """Return a dark, strong colour, the same one for a label each time."""
    red, green, blue = colorsys.hls_to_rgb(zlib.crc32(label.encode()) % 360 / 360, 0.35, 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)
