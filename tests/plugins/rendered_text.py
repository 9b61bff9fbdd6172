"""Pictures of text in several fonts, sizes and angles, and how far a reading is from what they say.

    python -m tests.plugins.rendered_text http://localhost:5000 rapidocr

asks a running server's model to read them all and tells its character error rates.
"""

from __future__ import annotations

import sys
from importlib.resources import files
from statistics import mean
from typing import Final, NamedTuple

import requests
from PIL import Image, ImageDraw, ImageFont

from tests.conftest import encode_image

#: Every small letter, every digit and the commoner signs.
LINES: Final = (
    "Sphinx of black",
    "quartz, judge my",
    "vow! Pack 5 boxes",
    "Order 40718 costs",
    "$236.95 (net 9%).",
    "Zoe & Max: 15:30",
)
_FONTS: Final = {
    "lato": "font_lato/Lato-Regular.ttf",
    "lato light": "font_lato/Lato-Light.ttf",
    "caladea": "font_caladea/Caladea-Regular.ttf",
    "caladea italic": "font_caladea/Caladea-Italic.ttf",
    "caladea bold": "font_caladea/Caladea-Bold.ttf",
}
#: The first is Pillow's own.
FONTS: Final = ("aileron", *_FONTS)


class Rendered(NamedTuple):
    """A picture, and the lines of text that it shows."""

    image: Image.Image
    lines: tuple[str, ...]


def render(
    lines: tuple[str, ...] = LINES,
    *,
    font: str = "lato",
    size: int = 32,
    angle: float = 0,
    ink: str = "black",
    ground: str = "white",
) -> Rendered:
    """Draw lines of text below each other.

    Args:
        lines: what is written.
        font: one of ``FONTS``.
        size: the font's, in pixels.
        angle: by how many degrees the text is turned, counter-clockwise.
        ink: the text's colour.
        ground: the picture's colour.
    """
    typeface = _typeface(font, size)
    width = int(max(typeface.getlength(line) for line in lines)) + 2 * size
    image = Image.new("RGB", (width, int(1.5 * size * len(lines)) + 2 * size), ground)
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((size, size + 1.5 * size * number), line, ink, typeface)
    return Rendered(image.rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor=ground), lines)


def samples() -> dict[str, list[Rendered]]:
    """Return the pictures whose error rates are told, by what they differ in; the last ones are the hardest."""
    return {
        "fonts": [render(font=font) for font in FONTS],
        "sizes": [render(size=size) for size in (14, 48)],
        "angles": [render(angle=angle) for angle in (-5, 3)],
        "colours": [render(ink="white", ground="navy"), render(ink="#999", ground="#bbb")],
        "10 pixels high, or turned by 10 degrees": [render(size=10), render(angle=10), render(angle=-10)],
    }


def error_rate(read: str, lines: tuple[str, ...]) -> float:
    """Return the character error rate: the edits that turn what was read into the truth, per character of the truth."""
    truth = "\n".join(lines)
    return _edits(read, truth) / len(truth)


def _typeface(font: str, size: int) -> ImageFont.FreeTypeFont:
    if font not in _FONTS:
        typeface = ImageFont.load_default(size)
        assert isinstance(typeface, ImageFont.FreeTypeFont)
        return typeface
    package, _, name = _FONTS[font].partition("/")
    return ImageFont.truetype(str(files(package) / "files" / name), size)


def _edits(first: str, second: str) -> int:
    """Return the Levenshtein distance."""
    previous = list(range(len(second) + 1))
    for row, one in enumerate(first, 1):
        current = [row]
        for column, other in enumerate(second, 1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (one != other)))
        previous = current
    return previous[-1]


def main(url: str, model: str) -> None:
    for name, pictures in samples().items():
        body = {"image": [encode_image(picture.image) for picture in pictures]}
        path = f"/api/tasks/optical_character_recognition/models/{model}/features"
        answers = requests.post(url + path, json=body, timeout=600).json()
        rates = [error_rate(read, picture.lines) for read, picture in zip(answers, pictures, strict=True)]
        sys.stdout.write(f"{name}: {mean(rates):.2%} of the characters, {len(pictures)} pictures\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
