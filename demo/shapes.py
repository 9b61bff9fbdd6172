"""Synthetic pictures: coloured shapes on a plain ground, with the truth about what was drawn.

Every picture follows from its seed alone, so that training and test pictures can be told apart by their seeds
(see :data:`TEST_SEED`) and a test can draw the same picture again at any time.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow")
GROUNDS = ("white", "grey", "black")

#: Seeds from here on are for tests and measurements; nothing is trained on them.
TEST_SEED = 1_000_000

Box = tuple[int, int, int, int]
Rgb = tuple[int, int, int]

# The lowest and highest value of the red, green and blue channel of each colour.
_CHANNELS: dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "red": ((190, 255), (0, 60), (0, 60)),
    "green": ((0, 60), (120, 255), (0, 80)),
    "blue": ((0, 60), (0, 90), (170, 255)),
    "yellow": ((215, 255), (195, 255), (0, 70)),
}
# The darkest and lightest shade of each ground.
_SHADES: dict[str, tuple[int, int]] = {"white": (235, 255), "grey": (105, 165), "black": (0, 25)}
_OVERSAMPLING = 4


@dataclass(frozen=True)
class Truth:
    """What was drawn: a shape of a colour on a ground, and the box around it in pixels.

    The box is ``(xmin, ymin, xmax, ymax)``; ``xmax`` and ``ymax`` are the first column and row outside the shape.
    """

    shape: str
    colour: str
    ground: str
    box: Box

    @property
    def label(self) -> str:
        """Return for example ``red circle``."""
        return f"{self.colour} {self.shape}"

    @property
    def caption(self) -> str:
        """Return for example ``a red circle on white``."""
        return f"a {self.label} on {self.ground}"


def draw_shape(
    seed: int,
    size: tuple[int, int] = (224, 224),
    *,
    shape: str | None = None,
    colour: str | None = None,
    ground: str | None = None,
    antialias: bool | None = None,
) -> tuple[Image.Image, Truth]:
    """Draw one shape at a random place in a picture of the given ``(width, height)``.

    What is not asked for is chosen at random, following from the seed.
    """
    image, truths = draw_shapes(seed, size, 1, shapes=[shape], colours=[colour], ground=ground, antialias=antialias)
    return image, truths[0]


def draw_shapes(
    seed: int,
    size: tuple[int, int] = (224, 224),
    count: int | None = None,
    *,
    shapes: Sequence[str | None] = (),
    colours: Sequence[str | None] = (),
    ground: str | None = None,
    antialias: bool | None = None,
) -> tuple[Image.Image, tuple[Truth, ...]]:
    """Draw shapes that do not touch each other (two or three, unless ``count`` says how many).

    ``shapes`` and ``colours`` give the first shapes' kinds and colours; ``None`` or a missing entry means random.
    """
    rng = random.Random(seed)
    count = rng.choice((2, 3)) if count is None else count
    smooth = rng.random() < 0.5 if antialias is None else antialias
    ground = ground or rng.choice(GROUNDS)
    image = Image.new("RGB", size, _ground_rgb(ground, rng))
    truths = []
    for index, box in enumerate(_place_boxes(rng, size, count)):
        shape = (shapes[index] if index < len(shapes) else None) or rng.choice(SHAPES)
        colour = (colours[index] if index < len(colours) else None) or rng.choice(COLOURS)
        image.paste(_colour_rgb(colour, rng), box, _shape_mask(shape, box[2] - box[0], smooth))
        truths.append(Truth(shape, colour, ground, box))
    return image, tuple(truths)


def _ground_rgb(ground: str, rng: random.Random) -> Rgb:
    """Choose a shade of the ground."""
    shade = rng.randint(*_SHADES[ground])
    return shade, shade, shade


def _colour_rgb(colour: str, rng: random.Random) -> Rgb:
    """Choose a tone of the colour."""
    red, green, blue = (rng.randint(low, high) for low, high in _CHANNELS[colour])
    return red, green, blue


def _place_boxes(rng: random.Random, size: tuple[int, int], count: int) -> list[Box]:
    """Choose ``count`` square boxes inside the picture that keep apart from each other."""
    width, height = size
    shorter = min(size)
    smallest, largest = (0.3, 0.7) if count == 1 else (0.22, 0.42)
    while True:
        boxes: list[Box] = []
        for _ in range(50):
            side = round(shorter * rng.uniform(smallest, largest))
            left, top = rng.randint(1, width - side - 1), rng.randint(1, height - side - 1)
            box = (left, top, left + side, top + side)
            if not any(_touch(box, other, margin=max(2, shorter // 30)) for other in boxes):
                boxes.append(box)
            if len(boxes) == count:
                return boxes


def _touch(first: Box, second: Box, margin: int) -> bool:
    """Tell whether two boxes come closer to each other than ``margin`` pixels."""
    return (
        first[0] - margin < second[2]
        and second[0] - margin < first[2]
        and first[1] - margin < second[3]
        and second[1] - margin < first[3]
    )


def _shape_mask(shape: str, side: int, smooth: bool) -> Image.Image:
    """Return the mask (white inside) of a shape that fills a square of the given side."""
    scale = _OVERSAMPLING if smooth else 1
    last = side * scale - 1
    mask = Image.new("L", (side * scale, side * scale), 0)
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((0, 0, last, last), fill=255)
    elif shape == "square":
        draw.rectangle((0, 0, last, last), fill=255)
    elif shape == "triangle":
        draw.polygon(((last / 2, 0), (last, last), (0, last)), fill=255)
    else:
        raise ValueError(f"unknown shape {shape!r}")
    return mask.resize((side, side), Image.Resampling.BOX) if smooth else mask
