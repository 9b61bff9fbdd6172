"""Recordings to ask about: noise that follows from a seed, files, samples as a request's base64."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np

from tests import media_files

RATE = 16_000


def noise(seed: int, seconds: float = 2.0) -> Any:
    """Return loud noise, which a random checkpoint answers with text that follows from it."""
    samples = np.random.default_rng(seed).normal(0, 0.2, round(seconds * RATE)).clip(-1, 1).astype(np.float32)
    samples[:: seed + 2] = 0
    return samples


def encode(samples: Any, rate: int = RATE) -> str:
    return media_files.encode(media_files.recording(samples, rate=rate))


def in_base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
