"""How pictures and recordings go into Ray's object store."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from feature_extraction_server.core import pixels
from feature_extraction_server.core.media import Audio

cloudpickle = pytest.importorskip("ray.cloudpickle", reason="ray[serve] is not installed")


@pytest.fixture
def registered() -> Iterator[None]:
    """Do what ``ray.util.register_serializer`` does, which needs a cluster."""
    dispatch = cloudpickle.CloudPickler.dispatch
    dispatch[Image.Image] = lambda picture: (pixels.unpack, (pixels.pack(picture),))
    yield
    del dispatch[Image.Image]


@pytest.mark.usefixtures("registered")
def test_pixels_and_samples_are_buffers_outside_of_the_pickle() -> None:
    picture = Image.effect_noise((640, 480), 60).convert("RGB")
    samples = np.linspace(-1, 1, 48_000, dtype=np.float32)
    buffers: list[object] = []

    message = {"image": [picture], "audio": [Audio(samples, 16_000)]}
    in_band = cloudpickle.dumps(message, protocol=5, buffer_callback=buffers.append)

    assert len(in_band) < 1_000
    read = cloudpickle.loads(in_band, buffers=buffers)
    assert read["image"][0].tobytes() == picture.tobytes()
    assert np.array_equal(read["audio"][0].samples, samples)
