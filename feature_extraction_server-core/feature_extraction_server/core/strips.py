"""Strips: pictures far longer than wide, or the other way, which resizing would make huge, or leave nothing of."""

from __future__ import annotations

from typing import Final

from PIL import Image

#: How many times longer than wide a picture may be; a longer one is a strip.
LONGEST_FORM: Final = 8


def cut_strips(images: list[Image.Image]) -> list[Image.Image]:
    """Cut strips down to their middle.

    For image processors that enlarge a picture until its short side fits, which may take gigabytes, and keep the middle
    square.
    """
    return [_middle(image) if _is_strip(image) else image for image in images]


def widen_strip(
    image: Image.Image, length: int, form: int = LONGEST_FORM, ground: str | float | tuple[int, ...] | None = "grey"
) -> tuple[Image.Image, tuple[int, int]]:
    """Put a strip on a ground that is none; return other pictures as they are.

    For image processors that keep a picture's form.

    Args:
        image: RGB.
        length: what a longer strip is shortened to, in pixels.
        form: how many times longer than wide the ground is.
        ground: its colour.

    Returns:
        The picture, and the size that the given one has at its upper left.
    """
    if not _is_strip(image):
        return image, image.size
    scale = min(1.0, length / max(image.size))
    strip = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    shortest = -(-max(strip.size) // form)
    canvas = Image.new("RGB", (max(strip.width, shortest), max(strip.height, shortest)), ground)
    canvas.paste(strip)
    return canvas, strip.size


def _is_strip(image: Image.Image) -> bool:
    return max(image.size) > LONGEST_FORM * min(image.size)


def _middle(image: Image.Image) -> Image.Image:
    longest = LONGEST_FORM * min(image.size)
    width, height = min(image.width, longest), min(image.height, longest)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
