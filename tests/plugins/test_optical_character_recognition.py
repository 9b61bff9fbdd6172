"""Models that read text: on pictures whose text is known, against their libraries alone, on pictures without text."""

from __future__ import annotations

import importlib
import io
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
from PIL import Image

from feature_extraction_server.core.engine import Engine
from feature_extraction_server.flask.app import create_app
from tests.plugins.asking import Ask
from tests.plugins.rendered_text import LINES, Rendered, error_rate, render, samples

pytestmark = pytest.mark.weights

TASK = "optical_character_recognition"
PICTURE = render(size=24)
#: The share of characters that each model may read wrongly, by kinds of pictures; None: it is not made for them.
BOUNDS: dict[str, list[float | None]] = {
    "rapidocr": [0.005, 0.005, 0.005, 0.005, 0.03],
    "tesseract": [0.01, 0.01, 0.02, 0.01, None],
}
WITHOUT_TEXT = {
    "one pixel": Image.new("RGB", (1, 1)),
    "blank": Image.new("RGB", (300, 200), "white"),
    "wide strip": Image.new("RGB", (3000, 4), "white"),
    "high strip": Image.new("RGB", (3, 900), "white"),
    "wider than any program takes": Image.new("RGB", (70_000, 2), "white"),
}


def need(model: str) -> None:
    if model == "tesseract" and shutil.which("tesseract") is None:
        reason = "Tesseract is not installed (apt-get install tesseract-ocr): its plugin is not tested"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


@pytest.fixture(params=list(BOUNDS))
def model(request: pytest.FixtureRequest) -> str:
    need(request.param)
    return str(request.param)


@pytest.fixture
def ask(asks: Callable[[str], Ask], model: str) -> Ask:
    return asks(model)


@pytest.fixture
def ask_tesseract(asks: Callable[[str], Ask]) -> Ask:
    need("tesseract")
    return asks("tesseract")


def test_text_of_several_fonts_sizes_angles_and_colours_is_read(ask: Ask, model: str) -> None:
    bounds = dict(zip(samples(), BOUNDS[model], strict=True))
    pictures = {kind: group for kind, group in samples().items() if bounds[kind] is not None}

    texts = iter(ask(TASK, image=[picture.image for group in pictures.values() for picture in group]))

    rates = {kind: mean(error_rate(next(texts), lines) for _, lines in group) for kind, group in pictures.items()}
    assert {kind: rate for kind, rate in rates.items() if rate > (bounds[kind] or 0)} == {}


@pytest.mark.parametrize(
    ("read", "n_wrong"),
    [("abc\nd", 0), ("abc d", 1), ("ab\nd", 1), ("abcc\nd", 1), ("d", 4), ("", 5)],
)
def test_error_rate_counts_what_is_wrong_missing_or_added(read: str, n_wrong: int) -> None:
    assert error_rate(read, ("abc", "d")) == pytest.approx(n_wrong / 5)


def test_lines_in_detail_are_those_of_the_text_and_lie_where_they_are_drawn(ask: Ask) -> None:
    lines = ask(TASK, image=PICTURE.image, config={"detail": True})

    assert "\n".join(line["text"] for line in lines) == ask(TASK, image=PICTURE.image)
    assert len(lines) == len(LINES)
    for number, line in enumerate(lines):
        assert line["confidence"] > 0.8
        left, top, right, bottom = line["box"]
        assert abs(left - 24) < 6
        assert 1.5 * 24 * number + 24 - 6 < top < bottom < 1.5 * 24 * (number + 1) + 24 + 6
        assert 100 < right < PICTURE.image.width


def test_answers_in_a_batch_are_those_of_the_images_alone(ask: Ask) -> None:
    pictures = [PICTURE.image, WITHOUT_TEXT["blank"], render(LINES[:1], font="caladea", size=20, angle=3).image]

    answers = ask(TASK, image=pictures, config={"detail": True})

    alone = [ask(TASK, image=picture, config={"detail": True}) for picture in pictures]
    for lines, expected in zip(answers, alone, strict=True):
        assert [line["text"] for line in lines] == [line["text"] for line in expected]
        assert [line["box"] for line in lines] == [line["box"] for line in expected]
        assert [line["confidence"] for line in lines] == pytest.approx([one["confidence"] for one in expected])


@pytest.mark.parametrize("picture", WITHOUT_TEXT.values(), ids=WITHOUT_TEXT.keys())
def test_picture_without_text_is_answered_with_nothing(ask: Ask, picture: Image.Image) -> None:
    assert ask(TASK, image=picture, config={"min_confidence": 0}) == ""


def test_text_in_a_strip_is_read(ask: Ask) -> None:
    strip = render(("The quick brown fox jumps over 13 lazy dogs and 24 cats",), size=20)
    image = strip.image.crop((0, 14, strip.image.width, 48))

    assert error_rate(ask(TASK, image=image), strip.lines) < 0.1


@pytest.mark.parametrize(("model", "width"), [("rapidocr", 4_800), ("tesseract", 33_000)])
def test_boxes_in_a_picture_that_is_made_smaller_are_in_its_own_pixels(
    asks: Callable[[str], Ask], model: str, width: int
) -> None:
    need(model)
    text = render(LINES[:1], size=120).image
    ground = Image.new("RGB", (width, 500), "white")
    ground.paste(text, (width - text.width, 60))

    (line,) = asks(model)(TASK, image=ground, config={"detail": True})

    assert line["text"] == LINES[0]
    expected = [width - text.width + 120, 60 + 120 + 30, width - 120, 60 + 120 + 120]
    assert line["box"] == pytest.approx(expected, abs=80)  # around the ink, with a margin


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"detail": 1}, "config.detail"),
        ({"min_confidence": 1.5}, "config.min_confidence"),
        ({"min_confidence": "0.5"}, "config.min_confidence"),
        ({"psm": 3}, "config.psm"),
        ({"model_path": "/etc/passwd"}, "config.model_path"),
    ],
    ids=str,
)
def test_config_that_does_not_fit_is_a_400_that_names_the_key(ask: Ask, config: dict[str, Any], field: str) -> None:
    response = ask.response(TASK, image=PICTURE.image, config=config)

    assert response.status_code == 400
    assert response.json["field"] == field


# RapidOCR


@pytest.mark.parametrize("picture", [PICTURE, render(angle=4)], ids=["upright", "slanted"])
def test_rapidocr_s_lines_are_those_of_the_library_alone(asks: Callable[[str], Ask], picture: Rendered) -> None:
    from rapidocr import RapidOCR

    alone: Any = RapidOCR(params={"Global.log_level": "error"})(picture.image)

    lines = asks("rapidocr")(TASK, image=picture.image, config={"detail": True})

    assert [line["text"] for line in lines] == list(alone.txts)
    assert [line["confidence"] for line in lines] == pytest.approx(list(alone.scores), abs=1e-4)
    boxes = np.concatenate([alone.boxes.min(axis=1), alone.boxes.max(axis=1)], axis=1)
    assert np.allclose([line["box"] for line in lines], boxes, atol=1e-3)


def test_rapidocr_reads_several_pictures_at_once_and_answers_as_it_does_to_each_alone(
    asks: Callable[[str], Ask], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = asks("rapidocr")
    pictures = [PICTURE.image, render(LINES[:1], font="caladea", size=20, angle=3).image]
    alone = [ask(TASK, image=picture, config={"detail": True}) for picture in pictures]
    plugin: Any = importlib.import_module("feature_extraction_server.models.rapidocr")
    reader, two_at_once = plugin.reader_beside_others, threading.Barrier(2)

    def read_beside_another(picture: Image.Image) -> Any:
        two_at_once.wait(60)
        return reader(picture)

    monkeypatch.setattr(plugin, "reader_beside_others", read_beside_another)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")

    assert ask(TASK, image=pictures, config={"detail": True}) == alone


def test_rapidocr_without_one_of_its_models_says_which_and_fetches_nothing(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    from feature_extraction_server.models import rapidocr

    monkeypatch.setitem(rapidocr._MODELS, "Rec", "no_such.onnx")
    client = create_app(build()).test_client()

    response = Ask(client, "rapidocr").response(TASK, image=PICTURE.image)

    assert response.status_code == 503
    assert response.json["code"] == "model_load_failed"
    assert "no_such.onnx" in response.json["error"]


# Tesseract


def test_tesseract_s_text_is_that_of_the_program_alone(ask_tesseract: Ask) -> None:
    file = io.BytesIO()
    PICTURE.image.save(file, "PPM")
    done = subprocess.run(["tesseract", "stdin", "stdout"], input=file.getvalue(), capture_output=True, check=True)
    alone = [line for line in done.stdout.decode().splitlines() if line.strip()]

    text = ask_tesseract(TASK, image=PICTURE.image, config={"min_confidence": 0})

    assert text.splitlines() == alone


def test_tesseract_reads_one_column_before_the_next_one(ask_tesseract: Ask) -> None:
    page = Image.new("RGB", (900, 420), "white")
    for number in range(2):
        column = tuple(f"{word} column {number + 1} here" for word in ("First", "Second", "Third", "Fourth", "Fifth"))
        page.paste(render(column, size=28).image, (450 * number, 40))

    text = ask_tesseract(TASK, image=page)

    assert [line[-6:-5] for line in text.splitlines()] == ["1"] * 5 + ["2"] * 5


@pytest.mark.parametrize("language", ["xyz", "eng+xyz"])
def test_tesseract_refuses_a_language_that_is_not_installed(ask_tesseract: Ask, language: str) -> None:
    response = ask_tesseract.response(TASK, image=PICTURE.image, config={"language": language})

    assert response.status_code == 400
    assert response.json["field"] == "config.language"
    assert "xyz is not installed; there is " in response.json["error"]


@pytest.mark.parametrize(
    "config",
    [{"language": "../../eng"}, {"language": "-c"}, {"language": "eng\n"}, {"page_segmentation": 2}],
    ids=str,
)
def test_tesseract_takes_no_argument_but_those_that_are_meant(ask_tesseract: Ask, config: dict[str, Any]) -> None:
    assert ask_tesseract.response(TASK, image=PICTURE.image, config=config).status_code == 400


@pytest.fixture
def serve_program(build: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ask]:
    """``serve_program(lines, SETTING=value)`` asks a server whose program tesseract is this shell script, or none."""

    def serve(lines: str | None, **settings: str) -> Ask:
        if lines is not None:
            program = tmp_path / "tesseract"
            told = 'case "$1" in --version) echo "tesseract 5";; --list-langs) echo "of 1"; echo eng;; *)'
            program.write_text(f"#!/bin/sh\n{told} {lines};; esac\n")
            program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        return Ask(create_app(build(LOAD_RETRY_DELAY="0", **settings)).test_client(), "tesseract")

    return serve


#: What the program prints of a Chinese line and of an English one below it, as a table and as a text.
TABLE = "\n".join(
    "\t".join(row.split())
    for row in """level page_num block_num par_num line_num word_num left top width height conf text
5 1 1 1 1 1 261 37 39 37 96.5 你
5 1 1 1 1 2 303 41 21 33 96.8 好
5 1 1 1 1 3 325 36 77 38 73.1 世界
5 1 1 1 2 1 43 141 85 28 92.8 Hello
5 1 1 1 2 2 141 141 90 28 91.6 world""".splitlines()
)
PLAIN = "你好世界\n\nHello    world\n\f"


def test_tesseract_s_spaces_are_those_of_its_text_where_words_are_characters(serve_program: Callable[..., Ask]) -> None:
    ask = serve_program(f"printf '%s' '{TABLE}\n{PLAIN}'")

    chinese, english = ask(TASK, image=Image.new("RGB", (500, 200)), config={"detail": True})

    assert (chinese["text"], english["text"]) == ("你好世界", "Hello world")
    assert (chinese["box"], english["box"]) == ([261, 36, 402, 74], [43, 141, 231, 169])
    assert chinese["confidence"] == pytest.approx((0.965 + 0.968 + 2 * 0.731) / 4)


@pytest.mark.parametrize(
    ("table", "read"), [(TABLE, "你 好 世界\nHello world"), (TABLE.splitlines()[0], "")], ids=["of less", "of nothing"]
)
def test_tesseract_s_text_of_another_look_at_the_page_is_not_taken_for_its_table_s(
    serve_program: Callable[..., Ask], table: str, read: str
) -> None:
    ask = serve_program(f"printf '%s' '{table}\nsomething else\n\f'")

    assert ask(TASK, image=Image.new("RGB", (500, 200))) == read


def test_tesseract_that_is_not_installed_is_a_503_that_says_what_to_do(serve_program: Callable[..., Ask]) -> None:
    response = serve_program(None).response(TASK, image=PICTURE.image)

    assert response.status_code == 503
    assert response.json["code"] == "model_load_failed"
    assert "install_system_dependencies.sh" in response.json["error"]


def test_tesseract_without_the_language_of_the_setting_is_a_503(serve_program: Callable[..., Ask]) -> None:
    response = serve_program("", TESSERACT_LANGUAGE="eng+xyz").response(TASK, image=PICTURE.image)

    assert response.status_code == 503
    assert "TESSERACT_LANGUAGE=eng+xyz: xyz is not installed; there is eng" in response.json["error"]


def test_tesseract_that_fails_is_a_500_with_its_reason(serve_program: Callable[..., Ask]) -> None:
    response = serve_program('echo "it is broken" >&2; exit 1').response(TASK, image=PICTURE.image)

    assert response.status_code == 500
    assert "it is broken" in response.json["error"]


def test_tesseract_that_takes_too_long_is_killed(serve_program: Callable[..., Ask], tmp_path: Path) -> None:
    left = tmp_path / "left"
    ask = serve_program(f"echo $$ >{left}; while :; do :; done", TESSERACT_TIMEOUT="0.3")

    response = ask.response(TASK, image=PICTURE.image)

    assert response.status_code == 500
    assert "longer than 0.3 s (TESSERACT_TIMEOUT)" in response.json["error"]
    assert not Path(f"/proc/{left.read_text().strip()}").exists()
