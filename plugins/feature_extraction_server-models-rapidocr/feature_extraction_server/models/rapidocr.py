"""RapidOCR: text in images, by the PP-OCRv6 models that come inside its package.

Code and weights: https://github.com/RapidAI/RapidOCR, Apache-2.0; the weights are PaddleOCR's, Apache-2.0.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from importlib.resources import files
from typing import Any, Final

from PIL.Image import Image
from PIL.Image import new as new_image

from feature_extraction_server.core import torch_threads
from feature_extraction_server.core.errors import ModelLoadFailed
from feature_extraction_server.core.ocr import Line, OcrConfig, ReadText, answer, in_reading_order

config_types = {"optical_character_recognition": OcrConfig}

#: What RapidOCR makes the longer side of a larger picture.
_MAX_SIDE: Final = 2000
#: A picture that is longer than so many times its width would be enlarged until it fills the memory.
_MAX_RATIO: Final = 8
_GROUND_RATIO: Final = 4
_MODELS: Final = {
    "Det": "PP-OCRv6_det_small.onnx",
    "Cls": "ch_ppocr_mobile_v2.0_cls_mobile.onnx",
    "Rec": "PP-OCRv6_rec_small.onnx",
}

reader: Any


def load_model() -> None:
    """Load the three models.

    Raises:
        ModelLoadFailed: the installed release of rapidocr lacks one, or it is broken.
    """
    global reader
    import numpy as np
    from rapidocr import RapidOCR

    # By their paths, since it would download what it misses or what differs.
    paths = {f"{part}.model_path": str(files("rapidocr") / "models" / name) for part, name in _MODELS.items()}
    n_threads = min(torch_threads.share(), os.cpu_count() or 1)  # more than the cores, it would not take
    threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": n for kind, n in (("intra", n_threads), ("inter", 1))}
    others = {"Global.log_level": "error", "Global.text_score": 0.0}
    blank = np.zeros((64, 64, 3), np.uint8)
    try:
        reader = RapidOCR(params=paths | threads | others)
        reader(blank, use_det=False)  # it loads each model when it first needs it
        reader(blank, use_det=True)
    except Exception as error:  # rapidocr, onnxruntime and their parsers raise errors of all sorts
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
        raise ModelLoadFailed(f"the models in the package rapidocr {version('rapidocr')}: {reason}") from error


def provenance() -> dict[str, str]:
    """Tell what the answers come from."""
    return {
        "checkpoint": "rapidocr: PP-OCRv6 small",
        "revision": version("rapidocr"),
        "dtype": "float32",
        "device": "cpu",
    }


def optical_character_recognition(image: list[Image], config: dict[str, Any]) -> list[ReadText]:
    # Lines go through the recognizer six at a time, those of one picture only: it pads them to the widest one, by which
    # it reads a little differently. Pictures side by side take as long as in turn, since each one uses all cores.
    return [answer(in_reading_order(_read(picture)), picture, config) for picture in image]


def _read(picture: Image) -> list[Line]:
    """Return the lines of one picture."""
    fitted, scale = _fit(picture)
    found = reader(fitted)
    if found.txts is None:
        return []
    corners = found.boxes / scale  # (n_lines, 4, 2)
    boxes = [[*quad.min(axis=0).tolist(), *quad.max(axis=0).tolist()] for quad in corners]
    return [
        Line(text=text, box=box, confidence=min(1.0, float(score)))
        for text, box, score in zip(found.txts, boxes, found.scores, strict=True)
    ]


def _fit(picture: Image) -> tuple[Image, float]:
    """Return a picture that is no strip, the given one at its upper left, and by how much that was scaled."""
    longer = max(picture.size)
    if longer <= _MAX_RATIO * min(picture.size):
        return picture, 1.0
    scale = min(1.0, _MAX_SIDE / longer)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    least = max(width, height) // _GROUND_RATIO
    ground = new_image("RGB", (max(width, least), max(height, least)), picture.getpixel((0, 0)))
    ground.paste(picture.resize((width, height)) if scale < 1 else picture)
    return ground, scale
