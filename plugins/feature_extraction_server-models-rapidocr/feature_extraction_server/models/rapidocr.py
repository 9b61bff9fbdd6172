"""RapidOCR: text in images, by the PP-OCRv6 models that come inside its package.

Code and weights: https://github.com/RapidAI/RapidOCR, Apache-2.0; the weights are PaddleOCR's, Apache-2.0.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from importlib.resources import files
from typing import Any, Final

from PIL.Image import Image

from feature_extraction_server.core import torch_threads
from feature_extraction_server.core.errors import ModelLoadFailed
from feature_extraction_server.core.ocr import Line, OcrConfig, ReadText, answer, in_reading_order
from feature_extraction_server.core.strips import widen_strip

config_types = {"optical_character_recognition": OcrConfig}

#: What RapidOCR makes the longer side of a larger picture.
_MAX_SIDE: Final = 2000
#: How many times longer than wide a strip's ground is.
_GROUND_FORM: Final = 4
_MODELS: Final = {
    "Det": "PP-OCRv6_det_small.onnx",
    "Cls": "ch_ppocr_mobile_v2.0_cls_mobile.onnx",
    "Rec": "PP-OCRv6_rec_small.onnx",
}

#: Of a batch, pictures that are read at the same time: large ones take 0.7 GB each meanwhile.
_MOST_AT_ONCE: Final = 4

#: The three models, with threads for all cores, and with those that are for each of several pictures at once.
reader: Any
reader_beside_others: Any


def load_model() -> None:
    """Load the three models, twice: how many threads there are is settled then.

    Raises:
        ModelLoadFailed: the installed release of rapidocr lacks one, or it is broken.
    """
    global reader, reader_beside_others
    n_threads = min(torch_threads.share(), os.cpu_count() or 1)  # more than the cores, it would not take
    try:
        reader = _load(n_threads)
        reader_beside_others = reader if n_threads == 1 else _load(n_threads // min(n_threads, _MOST_AT_ONCE))
    except Exception as error:  # rapidocr, onnxruntime and their parsers raise errors of all sorts
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
        raise ModelLoadFailed(f"the models in the package rapidocr {version('rapidocr')}: {reason}") from error


def _load(n_threads: int) -> Any:
    import numpy as np
    from rapidocr import RapidOCR

    # By their paths, since it would download what it misses or what differs.
    paths = {f"{part}.model_path": str(files("rapidocr") / "models" / name) for part, name in _MODELS.items()}
    threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": n for kind, n in (("intra", n_threads), ("inter", 1))}
    others = {"Global.log_level": "error", "Global.text_score": 0.0}
    blank = np.zeros((64, 64, 3), np.uint8)
    loaded = RapidOCR(params=paths | threads | others)
    loaded(blank, use_det=False)  # it loads each model when it first needs it
    loaded(blank, use_det=True)
    return loaded


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
    # it reads a little differently. But several pictures at once, on a part of the cores each, are faster than in turn.
    if len(image) < min(torch_threads.share(), _MOST_AT_ONCE):
        read = [_read(picture, reader) for picture in image]
    else:
        read = torch_threads.in_parallel(lambda picture: _read(picture, reader_beside_others), image, _MOST_AT_ONCE)
    return [answer(in_reading_order(lines), picture, config) for lines, picture in zip(read, image, strict=True)]


def _read(picture: Image, reader: Any) -> list[Line]:
    """Return the lines of one picture."""
    # A strip would be enlarged until it fills the memory.
    fitted, size = widen_strip(picture, _MAX_SIDE, _GROUND_FORM, picture.getpixel((0, 0)))
    found = reader(fitted)
    if found.txts is None:
        return []
    corners = found.boxes * (max(picture.size) / max(size))  # (n_lines, 4, 2)
    boxes = [[*quad.min(axis=0).tolist(), *quad.max(axis=0).tolist()] for quad in corners]
    return [
        Line(text=text, box=box, confidence=min(1.0, float(score)))
        for text, box, score in zip(found.txts, boxes, found.scores, strict=True)
    ]
