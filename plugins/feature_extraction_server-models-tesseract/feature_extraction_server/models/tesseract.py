"""Tesseract: text in images of pages, by the program that Debian packages.

Code: https://github.com/tesseract-ocr/tesseract, Apache-2.0. Weights: https://github.com/tesseract-ocr/tessdata_fast,
Apache-2.0.
"""

from __future__ import annotations

import csv
import io
import os
import subprocess
from itertools import groupby
from typing import Any, Final

from PIL.Image import Image
from pydantic import Field

from feature_extraction_server.core import torch_threads
from feature_extraction_server.core.errors import InvalidInput, ModelError, ModelLoadFailed
from feature_extraction_server.core.ocr import Line, OcrConfig, ReadText, answer
from feature_extraction_server.core.settings import Setting, SettingsManager

LANGUAGES: Final = r"\w+(\+\w+)*"
#: The program refuses pictures with a longer side than 32,767 pixels.
_MAX_SIDE: Final = 32_000
_WORD: Final = "5"  # the level of the table's rows that are words
_LINE_KEYS: Final = ("page_num", "block_num", "par_num", "line_num")


class TesseractConfig(OcrConfig):
    """What a client may ask of this model."""

    language: str | None = Field(None, pattern=f"^{LANGUAGES}$", max_length=100)
    page_segmentation: int = Field(3, ge=3, le=13)


config_types = {"optical_character_recognition": TesseractConfig}

language: Setting[str]
timeout: Setting[float]
installed: list[str]
release: str


def add_settings(settings_manager: SettingsManager) -> None:
    global language, timeout
    language = settings_manager.add_setting(
        name="TESSERACT_LANGUAGE",
        type=str,
        default="eng",
        pattern=LANGUAGES,
        description="The language, or languages joined by +, that Tesseract reads unless a request says otherwise",
    )
    timeout = settings_manager.add_setting(
        name="TESSERACT_TIMEOUT",
        type=float,
        default=120.0,
        minimum=0.1,
        description="Seconds that Tesseract may take for one image",
    )


def load_model() -> None:
    """Look for the program and its languages.

    Raises:
        ModelLoadFailed: it is not installed, or the language of TESSERACT_LANGUAGE is not.
    """
    global installed, release
    release = _run("--version").split()[1]
    installed = _run("--list-langs").splitlines()[1:]
    missing = _missing(language.get())
    if missing:
        raise ModelLoadFailed(
            f"TESSERACT_LANGUAGE={language.get()}: {missing} is not installed; there is {', '.join(installed)}"
        )


def provenance() -> dict[str, str]:
    """Tell what the answers come from, unless a request asks for another language."""
    return {
        "checkpoint": f"tesseract: {language.get()}",
        "revision": release,
        "dtype": "int8",
        "device": "cpu",
    }


def optical_character_recognition(image: list[Image], config: dict[str, Any]) -> list[ReadText]:
    languages = config.get("language", language.get())
    if missing := _missing(languages):
        reason = f"config.language: {missing} is not installed; there is {', '.join(installed)}"
        raise InvalidInput(reason, field="config.language")
    arguments = ("-l", languages, "--psm", str(config.get("page_segmentation", 3)))
    found = torch_threads.in_parallel(lambda picture: _read(picture, arguments), image)
    return [answer(lines, picture, config) for lines, picture in zip(found, image, strict=True)]


def _missing(languages: str) -> str | None:
    return next((name for name in languages.split("+") if name not in installed), None)


def _read(picture: Image, arguments: tuple[str, ...]) -> list[Line]:
    """Return the lines of one picture, in the order that Tesseract reads a page's blocks in."""
    scale = min(1.0, _MAX_SIDE / max(picture.size))
    if scale < 1:
        picture = picture.resize([max(1, round(side * scale)) for side in picture.size])
    file = io.BytesIO()
    picture.save(file, "PPM")
    # Of some languages, Chinese and Thai among them, the table's words are parts of words: only the text, which comes
    # with the table in one output, tells where spaces are.
    printed = _run("stdin", "stdout", *arguments, "tsv", "txt", stdin=file.getvalue()).split("\n")
    table = csv.DictReader((row for row in printed if "\t" in row), delimiter="\t", quoting=csv.QUOTE_NONE)
    texts = [" ".join(row.split()) for row in printed if "\t" not in row and row.strip()]
    words = [row for row in table if row["level"] == _WORD and row["text"].strip()]
    by_line = [list(line) for _, line in groupby(words, lambda word: [word[key] for key in _LINE_KEYS])]
    if len(texts) != len(by_line):  # for the text, the program looks again at a page in which it found nothing
        texts = [" ".join(word["text"] for word in line) for line in by_line]
    return [_line(text, line, scale) for text, line in zip(texts, by_line, strict=True)]


def _line(text: str, words: list[dict[str, str]], scale: float) -> Line:
    """Put a line together; its confidence is the mean of its words', by their lengths."""
    boxes = [[int(word[key]) for key in ("left", "top", "width", "height")] for word in words]
    box = [
        min(left for left, _, _, _ in boxes),
        min(top for _, top, _, _ in boxes),
        max(left + width for left, _, width, _ in boxes),
        max(top + height for _, top, _, height in boxes),
    ]
    weights = [len(word["text"]) for word in words]
    confidence = sum(float(word["conf"]) * weight for word, weight in zip(words, weights, strict=True)) / sum(weights)
    return Line(
        text=text,
        box=[value / scale for value in box],
        confidence=min(1.0, max(0.0, confidence / 100)),
    )


def _run(*arguments: str, stdin: bytes = b"") -> str:
    """Run the program, kill it where it takes too long, and return what it prints.

    Raises:
        ModelLoadFailed: the program is not there.
        ModelError: it fails, or takes longer than TESSERACT_TIMEOUT.
    """
    environment = os.environ | {"OMP_THREAD_LIMIT": "1"}  # images are read side by side, which takes less than threads
    try:
        done = subprocess.run(
            ["tesseract", *arguments], input=stdin, capture_output=True, env=environment, timeout=timeout.get()
        )
    except FileNotFoundError:
        raise ModelLoadFailed(
            "the program tesseract is not installed: install_system_dependencies.sh beside this plugin's README "
            "installs it (Debian's packages tesseract-ocr and tesseract-ocr-eng)"
        ) from None
    except subprocess.TimeoutExpired:
        raise ModelError(f"Tesseract took longer than {timeout.get():g} s (TESSERACT_TIMEOUT)") from None
    if done.returncode:
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"])[0][:300]
        raise ModelError(f"Tesseract failed: {reason}")
    return done.stdout.decode(errors="replace")
