"""Sample inputs of tasks: what a model is tried on, written as a client would send them.

They are different pictures, recordings and texts, of different sizes. A model or a task whose inputs need more than
that has samples of its own:

    samples = {"count_people": [{"image": "<base64>"}, ...]}     # in a model's module
    samples = [{"image": "<base64>"}, ...]                       # in a task's module

Those of one task differ in the batch fields only.
"""

from __future__ import annotations

import base64
import io
from typing import Any, Final

import numpy as np
import soundfile
from PIL import Image, ImageDraw, ImageFont

from feature_extraction_server.core.plugins import Registry
from feature_extraction_server.core.task import (
    AudioField,
    ConfigField,
    ImageField,
    InputField,
    StringListField,
    TextField,
)

N_SAMPLES: Final = 4
SAMPLING_RATE: Final = 16_000
_SIZES: Final = ((320, 240), (200, 300), (256, 256), (500, 180))
_COLOURS: Final = (("red", "white"), ("gold", "navy"), ("black", "lightgreen"), ("blue", "orange"))
TEXTS: Final = (
    "a red circle on white",
    "Two dogs run through the snow, and a cat watches them.",
    "Where is the nearest station?",
    "Sunshine 42",
)
CLASSES: Final = ("circle", "line of text", "cat")


def samples_of(registry: Registry, model: str, task: str) -> list[dict[str, Any]]:
    """Return the sample inputs of a model's task; none where its input is not declared and nobody gave any."""
    own = getattr(registry.models[model], "samples", {}).get(task) or getattr(registry.tasks[task], "samples", None)
    if own:
        return list(own)
    spec = registry.spec(task)
    if spec is None:
        return []
    fields = {key: field for key, field in spec.inputs.items() if not isinstance(field, ConfigField)}
    return [{key: _sample(field, number) for key, field in fields.items()} for number in range(N_SAMPLES)]


def _sample(field: InputField, number: int) -> Any:
    if isinstance(field, ImageField):
        return _base64(_picture(number))
    if isinstance(field, AudioField):
        return _base64(_recording(number))
    if isinstance(field, TextField):
        return TEXTS[number]
    if isinstance(field, StringListField):
        return list(CLASSES)
    return field.schema["examples"][0]


def _base64(file: bytes) -> str:
    return base64.b64encode(file).decode()


def _picture(number: int) -> bytes:
    """Return a picture (PNG) with a disk, a line of text below it, and some noise."""
    width, height = _SIZES[number]
    colour, ground = _COLOURS[number]
    image = Image.new("RGB", (width, height), ground)
    draw = ImageDraw.Draw(image)
    side = min(width, height) // 2
    draw.ellipse((20 * number + 10, 10, 20 * number + 10 + side, 10 + side), fill=colour)
    draw.text((10, height - 45), TEXTS[number][:24], colour, ImageFont.load_default(24))
    noise = np.random.default_rng(number).integers(-12, 13, (height, width, 3))
    pixels = np.clip(np.asarray(image, np.int16) + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def _recording(number: int) -> bytes:
    """Return a recording (WAV) of 1 to 4 s that is built as a voice is: harmonics of a gliding pitch, in syllables."""
    seconds = 1.0 + number
    time_s = np.arange(int(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    pitch_hz = 110 + 40 * number + 15 * np.sin(2 * np.pi * 0.7 * time_s)
    phase = 2 * np.pi * np.cumsum(pitch_hz) / SAMPLING_RATE
    formants_hz = (700 - 90 * number, 1200 + 200 * number, 2600)
    voice = np.zeros_like(time_s)
    for harmonic in range(1, 30):
        loudness = sum(np.exp(-(((harmonic * pitch_hz - formant) / 200) ** 2)) for formant in formants_hz)
        voice += loudness * np.sin(harmonic * phase)
    syllables = np.maximum(0, np.sin(2 * np.pi * (2.5 + 0.5 * number) * time_s))
    samples = 0.5 * voice * syllables / np.abs(voice).max()
    soundfile.write(file := io.BytesIO(), samples.astype(np.float32), SAMPLING_RATE, format="WAV")
    return file.getvalue()
