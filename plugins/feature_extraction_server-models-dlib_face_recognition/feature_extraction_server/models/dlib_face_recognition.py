"""dlib's face models: faces, found by gradients or by a network, and turned into vectors of 128 numbers.

Weights: the package face-recognition-models, CC0; how they were trained: https://github.com/davisking/dlib-models
The vectors: http://blog.dlib.net/2017/02/high-quality-face-recognition-with-deep.html
"""

from __future__ import annotations

import math
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL.Image import Image
from pydantic import Field

from feature_extraction_server.core.config import EmbeddingConfig
from feature_extraction_server.core.errors import ModelLoadFailed

PACKAGE = "face_recognition_models"  # it is not imported: it wants pkg_resources, which setuptools no longer has
CHIP_SIDE = 150  # of the upright faces that the network sees, in pixels
CHIP_PADDING = 0.25
CHIPS_A_CALL = 32
SMALLEST_SIDE = 30  # of a picture, in pixels: in less there is no face for the detectors, and dlib's network fails

# dlib's network and its second detector hold Python's interpreter lock for seconds.
consumer_type = "process_consumer"


class FaceConfig(EmbeddingConfig):
    """What a client may ask of this model."""

    detector: Literal["hog", "cnn"] = "hog"
    upsample: int | None = Field(None, ge=0, le=3)
    threshold: float = Field(0, ge=0, le=10)


class Detector(NamedTuple):
    """``model`` finds faces from 80 or 40 pixels on; a picture is upsampled ``upsample`` times unless a client says.

    Its time and, for the network, its memory grow with the pixels, of which it gets ``max_pixels`` at most.
    """

    model: Any
    upsample: int
    max_pixels: int


config_types = {"face_embedding": FaceConfig}

detectors: dict[str, Detector]
landmarks: Any
network: Any


def load_model() -> None:
    global detectors, landmarks, network
    import dlib

    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelLoadFailed("the package face-recognition-models, which has the weights, is not installed")
    folder = Path(spec.origin).parent / "models"
    try:
        cnn = dlib.cnn_face_detection_model_v1(str(folder / "mmod_human_face_detector.dat"))
        landmarks = dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat"))
        network = dlib.face_recognition_model_v1(str(folder / "dlib_face_recognition_resnet_model_v1.dat"))
    except RuntimeError as error:
        raise ModelLoadFailed(f"the weights in the folder {folder} are incomplete or broken: {error}") from error
    hog = dlib.get_frontal_face_detector()
    detectors = {"hog": Detector(hog, 1, 16_000_000), "cnn": Detector(cnn, 0, 1_000_000)}


def provenance() -> dict[str, str]:
    """Return which weights the vectors come from, and where they are computed."""
    import dlib

    return {
        "checkpoint": "face-recognition-models",
        "revision": metadata.version("face-recognition-models"),
        "dtype": "float32",
        "device": "cuda" if dlib.DLIB_USE_CUDA else "cpu",
    }


def face_embedding(image: list[Image], config: dict[str, Any]) -> list[list[dict[str, Any]]]:
    import dlib
    import numpy as np

    wanted = FaceConfig(**config)
    found = [_find(picture, wanted) for picture in image]
    chips = []
    for picture, faces in zip(image, found, strict=True):
        pixels = np.array(picture) if faces else None
        for face in faces:
            shape = landmarks(pixels, dlib.rectangle(*map(round, face["box"])))
            chips.append(dlib.get_face_chip(pixels, shape, CHIP_SIDE, CHIP_PADDING))
    starts = range(0, len(chips), CHIPS_A_CALL)
    calls = [network.compute_face_descriptor(chips[start : start + CHIPS_A_CALL]) for start in starts]
    vectors = (np.array(vector) for call in calls for vector in call)
    for face, vector in zip((face for faces in found for face in faces), vectors, strict=True):
        face["embedding"] = vector / np.linalg.norm(vector) if wanted.normalize else vector
    return found


def _find(image: Image, wanted: FaceConfig) -> list[dict[str, Any]]:
    """Return the faces of an image, each with ``box`` and ``score``."""
    import numpy as np

    model, upsample, max_pixels = detectors[wanted.detector]
    if wanted.upsample is not None:
        upsample = wanted.upsample
    n_pixels = image.width * image.height
    while upsample and n_pixels * 4**upsample > max_pixels:
        upsample -= 1
    shrink = min(1, math.sqrt(max_pixels / n_pixels))
    if shrink < 1:
        size = max(1, int(image.width * shrink)), max(1, int(image.height * shrink))
        searched = image.resize(size, reducing_gap=2)
    else:
        searched = image
    if min(searched.size) * 2**upsample < SMALLEST_SIDE:
        return []
    if wanted.detector == "hog":
        rectangles, scores, _ = model.run(np.array(searched), upsample)
    else:
        detections = model(np.array(searched), upsample)
        rectangles, scores = [one.rect for one in detections], [one.confidence for one in detections]
    x, y = image.width / searched.width, image.height / searched.height
    return [
        {"box": [place.left() * x, place.top() * y, place.right() * x, place.bottom() * y], "score": score}
        for place, score in zip(rectangles, scores, strict=True)
        if score > wanted.threshold
    ]
