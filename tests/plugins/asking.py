"""Asking a model over HTTP, and pictures of many forms to ask about."""

from __future__ import annotations

from typing import Any

import numpy as np
from flask.testing import FlaskClient
from PIL import Image

from tests.conftest import encode_image


def draw(seed: int, size: tuple[int, int] = (80, 60), mode: str = "RGB") -> Image.Image:
    """Return a picture of coloured patches that follows from its seed."""
    patches = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize(size, Image.Resampling.NEAREST).convert(mode)


PICTURES = {
    "wide": draw(0),
    "high": draw(1, (30, 90)),
    "grey": draw(2, (64, 64), "L"),
    "palette": draw(3, (100, 40), "P"),
    "one pixel": draw(4, (1, 1)),
    "one row": draw(5, (7, 1)),
}


class Ask:
    """``ask(task, field=..., ...)`` sends a request for one model over HTTP and returns the answer.

    Pictures are encoded on the way. An answer other than 200 fails the test.
    """

    def __init__(self, client: FlaskClient, model: str) -> None:
        self._client = client
        self._model = model

    def __call__(self, task: str, **body: Any) -> Any:
        response = self.response(task, **body)
        assert response.status_code == 200, response.json
        return response.json

    def response(self, task: str, **body: Any) -> Any:
        """Send the request and return the whole response."""
        image = body.get("image")
        if isinstance(image, list):
            body["image"] = [encode_image(picture) for picture in image]
        elif image is not None:
            body["image"] = encode_image(image)
        return self._client.post(f"/api/models/{self._model}/tasks/{task}/features", json=body)
