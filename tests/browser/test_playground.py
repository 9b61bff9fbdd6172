"""The playground in a real Chromium: everything that a visitor can do there, by mouse, by keyboard and on a phone."""

from __future__ import annotations

import base64
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import FilePayload, Locator, Page, Route, expect

from tests.browser.conftest import MakeSite, OpenPage
from tests.conftest import encode_image
from tests.media_files import encode, recording

pytestmark = pytest.mark.process

RED = base64.b64decode(encode_image(Image.new("RGB", (40, 30), "red")))
BLUE = base64.b64decode(encode_image(Image.new("RGB", (20, 60), "blue")))
SOUND = base64.b64decode(encode(recording([0.0] * 80)))

VECTORS = """
from feature_extraction_server.core.task import TaskSpec, TextField
wrap = TaskSpec(description="Count letters.", inputs={"text": TextField("A word")}, output=list[float]).wrap
"""
COUNTER = """
def load_model(): pass
def letters(text): return [[float(word.count(letter)) for letter in "abcd"] for word in text]
"""
LISTING = """
from pydantic import Field
from feature_extraction_server.core.config import Config
class Options(Config):
    n: int = Field(1, ge=1, le=9)
    loud: bool = False
config_types = {"image_captioning": Options}
def load_model(): pass
def image_captioning(image, config): return [[f"{sorted(config.items())}"] for _ in image]
"""
NOTE = """
from feature_extraction_server.core.task import ImageField, StringListField, TaskSpec, TextField
wrap = TaskSpec(
    description="Note.",
    inputs={
        "text": TextField("A text"),
        "image": ImageField("A picture", required=False),
        "classes": StringListField("Classes"),
    },
    output=str,
).wrap
"""
NOTER = """
def load_model(): pass
def note(text, classes, image=None):
    pictures = image or [None] * len(text)
    sizes = ["nothing" if picture is None else "%dx%d" % picture.size for picture in pictures]
    return [f"{size} {line} {classes}" for size, line in zip(sizes, text)]
"""
BLOCKED = """
import threading
release = threading.Event()
def load_model(): pass
def image_captioning(image, config):
    release.wait(60)
    return [["done"] for _ in image]
"""
DETECTOR = """
import threading
release = threading.Event()
release.set()
def load_model(): pass
def object_detection(image, config):
    release.wait(60)
    boxes = [[10, 15, 30, 30], [0, 0, 8, 6]]
    return [{"boxes": boxes, "labels": ["<b>cat</b>", "dog"], "scores": [0.75, 0.5]} for _ in image]
"""
COUNT_ADDRESSES = """() => {
    globalThis.addresses = new Set();
    const { createObjectURL, revokeObjectURL } = URL;
    URL.createObjectURL = (file) => {
        const address = createObjectURL.call(URL, file);
        addresses.add(address);
        return address;
    };
    URL.revokeObjectURL = (address) => {
        addresses.delete(address);
        revokeObjectURL.call(URL, address);
    };
}"""


def file(name: str, content: bytes, kind: str) -> FilePayload:
    return {"name": name, "mimeType": kind, "buffer": content}


RED_FILE = file("red.png", RED, "image/png")
BLUE_FILE = file("blue.png", BLUE, "image/png")


def choose(page: Page, task: str, model: str) -> None:
    page.get_by_label("Task", exact=True).select_option(task)
    page.locator(f"[data-model={model}] input").check()


def run(page: Page) -> Locator:
    """Run, and return the panel of the answer once it is there."""
    page.get_by_role("button", name="Run", exact=True).click()
    panel = page.get_by_role("tabpanel", name="Answer")
    expect(panel.locator("[data-kind]").first).to_be_visible()
    return panel


def command(page: Page, name: str) -> str:
    page.get_by_role("tab", name=name).click()
    return str(page.get_by_role("tabpanel", name=name).locator("pre").text_content())


# What every task's answer looks like


def test_captions_are_shown_as_text(site: MakeSite, open_page: OpenPage) -> None:
    page = open_page(site())
    choose(page, "image_captioning", "fake_echo")
    page.get_by_label("Image", exact=True).set_input_files(RED_FILE)

    expect(run(page).locator("[data-kind=texts] li")).to_have_text(["40x30 (255, 0, 0)"])


def test_several_files_are_one_request_with_an_answer_each(site: MakeSite, open_page: OpenPage) -> None:
    page = open_page(site())
    choose(page, "image_captioning", "fake_echo")
    page.get_by_label("Image", exact=True).set_input_files([RED_FILE, BLUE_FILE])

    items = run(page).locator("ol.batch > li")
    expect(items).to_have_text([re.compile("red.png.*40x30"), re.compile("blue.png.*20x60")])


def test_probabilities_are_bars_sorted_by_size(
    site: MakeSite, open_page: OpenPage, plugin: Callable[..., None]
) -> None:
    source = (
        "def load_model(): pass\ndef zero_shot_image_classification(image, classes, config): return [[0.2, 0.7, 0.1]]"
    )
    plugin("models", "classifier", source)
    page = open_page(site())
    choose(page, "zero_shot_image_classification", "classifier")
    page.get_by_label("Image", exact=True).set_input_files(RED_FILE)
    page.get_by_label("Classes", exact=True).fill("cat\ndog\nbird")

    bars = run(page).locator("[data-kind=probabilities] li")
    expect(bars).to_have_text(["dog70.0 %", "cat20.0 %", "bird10.0 %"])
    widths = [bars.nth(n).locator(".bar span").evaluate("e => e.getBoundingClientRect().width") for n in range(3)]
    assert widths[0] / widths[1] == pytest.approx(3.5, rel=0.02)


def test_boxes_are_drawn_over_the_picture_where_they_are_with_labels_and_scores(
    site: MakeSite, open_page: OpenPage, plugin: Callable[..., None]
) -> None:
    plugin("models", "detector", DETECTOR)
    page = open_page(site())
    choose(page, "object_detection", "detector")
    page.get_by_label("Image", exact=True).set_input_files(RED_FILE)

    panel = run(page)
    expect(panel.locator(".box")).to_have_text(["<b>cat</b> 75.0 %", "dog 50.0 %"])
    picture, box = panel.locator(".frame img").bounding_box(), panel.locator(".box").first.bounding_box()
    assert picture is not None
    assert box is not None
    shares = (box["x"] - picture["x"]) / picture["width"], (box["y"] - picture["y"]) / picture["height"]
    assert shares == pytest.approx((10 / 40, 15 / 30), abs=0.02)
    assert (box["width"] / picture["width"], box["height"] / picture["height"]) == pytest.approx((0.5, 0.5), abs=0.02)


def test_boxes_are_drawn_over_the_picture_that_was_sent(
    site: MakeSite, open_page: OpenPage, plugin: Callable[..., None]
) -> None:
    plugin("models", "detector", DETECTOR)
    release = importlib.import_module("feature_extraction_server.models.detector").release
    release.clear()
    page = open_page(site())
    choose(page, "object_detection", "detector")
    page.get_by_label("Image", exact=True).set_input_files(RED_FILE)
    page.get_by_role("button", name="Run", exact=True).click()

    page.get_by_role("button", name="Remove red.png").click()
    page.get_by_label("Image", exact=True).set_input_files(BLUE_FILE)
    release.set()

    expect(page.locator(".frame .box").first).to_be_visible()
    assert page.locator(".frame img").evaluate("picture => [picture.naturalWidth, picture.naturalHeight]") == [40, 30]


def test_pictures_of_an_answer_are_let_go_of_when_the_next_one_comes(
    site: MakeSite, open_page: OpenPage, plugin: Callable[..., None]
) -> None:
    plugin("models", "detector", DETECTOR)
    page = open_page(site())
    page.evaluate(COUNT_ADDRESSES)
    choose(page, "object_detection", "detector")
    page.get_by_label("Image", exact=True).set_input_files(RED_FILE)

    for _ in range(3):
        page.get_by_role("button", name="Run", exact=True).click()
        expect(page.get_by_role("button", name="Run", exact=True)).to_be_visible()

    shown = page.locator(".frame img, .files img").evaluate_all("pictures => pictures.map((picture) => picture.src)")
    assert sorted(page.evaluate("[...addresses]")) == sorted(shown)


def test_lines_of_text_are_drawn_over_the_picture_where_they_were_read(
    site: MakeSite, open_page: OpenPage, plugin: Callable[..., None]
) -> None:
    lines = [{"text": "Exit", "box": [10, 15, 30, 30], "confidence": 0.75}]
    source = f"def load_model(): pass\ndef optical_character_recognition(image, config): return [{lines}]"
    plugin("models", "reader", source)
    page = open_page(site())
    choose(page, "optical_character_recognition", "reader")
    page.get_by_label("Image", exact=True).set_input_files(RED_FILE)

    expect(run(page).locator(".frame .box")).to_have_text(["Exit 75.0 %"])


def test_boxes_of_given_classes_are_drawn_like_those_of_any(
    site: MakeSite, open_page: OpenPage, plugin: Callable[..., None]
) -> None:
    plugin(
        "models", "detector", DETECTOR.replace("object_detection(image,", "zero_shot_object_detection(image, classes,")
    )
    page = open_page(site())
    choose(page, "zero_shot_object_detection", "detector")
    page.get_by_label("Image", exact=True).set_input_files(RED_FILE)
    page.get_by_label("Classes", exact=True).fill("<b>cat</b>\ndog")

    expect(run(page).locator(".box")).to_have_text(["<b>cat</b> 75.0 %", "dog 50.0 %"])


def test_classes_that_a_model_knows_are_bars_best_first(
    site: MakeSite, open_page: OpenPage, plugin: Callable[..., None]
) -> None:
    answer = '{"labels": ["cat", "dog"], "scores": [0.2, 0.7]}'
    plugin("models", "knower", f"def load_model(): pass\ndef image_classification(image, config): return [{answer}]")
    page = open_page(site())
    choose(page, "image_classification", "knower")
    page.get_by_label("Image", exact=True).set_input_files(RED_FILE)

    expect(run(page).locator("[data-kind=probabilities] li")).to_have_text(["dog70.0 %", "cat20.0 %"])


def test_transcript_is_shown_as_text(site: MakeSite, open_page: OpenPage) -> None:
    page = open_page(site())
    choose(page, "automated_speech_recognition", "fake_echo")
    page.get_by_label("Audio", exact=True).set_input_files(file("a.wav", SOUND, "audio/wav"))

    expect(run(page).locator("[data-kind=text]")).to_have_text("80 samples at 8000 Hz")


def test_who_speaks_when_is_shown_as_a_list_with_times(
    site: MakeSite, open_page: OpenPage, plugin: Callable[..., None]
) -> None:
    answer = '[{"start": 0.001, "end": 0.005, "speaker": 7}]'
    plugin("models", "listener", f"def load_model(): pass\ndef audio_diarization(audio, config): return [{answer}]")
    page = open_page(site())
    choose(page, "audio_diarization", "listener")
    page.get_by_label("Audio", exact=True).set_input_files(file("a.wav", SOUND, "audio/wav"))

    expect(run(page).locator("[data-kind=segments] li")).to_have_text(["0.00 \u2013 0.01speaker_0"])


def test_vectors_are_shown_by_their_length_a_plot_and_their_similarity_to_the_last_one(
    site: MakeSite, open_page: OpenPage, plugin: Callable[..., None]
) -> None:
    plugin("tasks", "letters", VECTORS)
    plugin("models", "counter", COUNTER)
    page = open_page(site())
    choose(page, "letters", "counter")
    page.get_by_label("Text").fill("aaab")
    first = run(page)
    expect(first.locator("dl")).to_contain_text("Numbers4")
    expect(first.locator("dl")).not_to_contain_text("Similarity")
    expect(first.get_by_role("img")).to_have_attribute("aria-label", "Plot of the 4 numbers")

    page.get_by_label("Text").fill("abbb")
    page.get_by_role("button", name="Run", exact=True).click()

    expect(first.locator("dl")).to_contain_text(re.compile(r"Similarity to the last one .*0\.600"))


def test_answer_of_no_known_kind_is_shown_as_json(
    site: MakeSite, open_page: OpenPage, plugin: Callable[..., None]
) -> None:
    plugin("tasks", "odd", 'def wrap(func):\n    def odd(n: int): return {"n": func(n)}\n    return odd')
    plugin("models", "plus", "def load_model(): pass\ndef odd(n): return n + 1")
    page = open_page(site())
    choose(page, "odd", "plus")
    page.get_by_label("N", exact=True).fill("41")

    expect(run(page).locator("[data-kind=json]")).to_have_text('{\n  "n": 42\n}')


# Ways to bring something in


def test_task_plugin_shows_up_by_itself_with_a_field_for_each_key(
    site: MakeSite, open_page: OpenPage, plugin: Callable[..., None]
) -> None:
    plugin("tasks", "letters", VECTORS)
    page = open_page(site())

    page.get_by_label("Task", exact=True).select_option("letters")

    expect(page.get_by_text("Count letters.")).to_be_visible()
    expect(page.get_by_label("Text")).to_be_visible()
    expect(page.get_by_text("No model for this task is installed.")).to_be_visible()
    expect(page.get_by_role("button", name="Run", exact=True)).to_be_disabled()


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_image_can_be_dropped_and_pasted(site: MakeSite, open_page: OpenPage, way: str) -> None:
    page = open_page(site())
    choose(page, "image_captioning", "fake_echo")
    transfer = page.evaluate_handle(
        """(base64) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
            transfer.items.add(new File([bytes], "red.png", { type: "image/png" }));
            return transfer;
        }""",
        base64.b64encode(RED).decode(),
    )

    if way == "drop":
        page.locator(".field.image .zone").dispatch_event("drop", {"dataTransfer": transfer})
    else:
        page.evaluate(
            "(clipboardData) => document.dispatchEvent(new ClipboardEvent('paste', { clipboardData }))", transfer
        )

    expect(page.get_by_role("list", name="Chosen for Image")).to_contain_text("red.png")
    expect(run(page)).to_contain_text("40x30")


@pytest.mark.parametrize("place", ["a text", "no text"])
def test_text_that_comes_with_a_picture_of_itself_is_pasted_where_texts_are_typed(
    site: MakeSite, open_page: OpenPage, place: str
) -> None:
    page = open_page(site(), permissions=["clipboard-read", "clipboard-write"])
    choose(page, "zero_shot_image_classification", "fake_echo")
    page.evaluate(
        """async (base64) => {
            const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
            const parts = { "text/plain": "cat\\ndog", "text/html": "<td>cat</td><td>dog</td>", "image/png": bytes };
            const blobs = Object.entries(parts).map(([type, part]) => [type, new Blob([part], { type })]);
            await navigator.clipboard.write([new ClipboardItem(Object.fromEntries(blobs))]);
        }""",
        base64.b64encode(RED).decode(),
    )

    if place == "a text":
        page.get_by_label("Classes", exact=True).focus()
    page.keyboard.press("Control+v")

    chosen = page.get_by_role("list", name="Chosen for Image").locator("li")
    expect(page.get_by_label("Classes", exact=True)).to_have_value("cat\ndog" if place == "a text" else "")
    expect(chosen).to_have_count(0 if place == "a text" else 1)


def test_file_can_be_removed_again(site: MakeSite, open_page: OpenPage) -> None:
    page = open_page(site())
    choose(page, "image_captioning", "fake_echo")
    page.get_by_label("Image", exact=True).set_input_files([RED_FILE, BLUE_FILE])

    page.get_by_role("button", name="Remove red.png").click()

    expect(run(page).locator("[data-kind=texts]")).to_have_text("20x60 (0, 0, 255)")


def test_audio_can_be_recorded(site: MakeSite, open_page: OpenPage) -> None:
    page = open_page(site())
    choose(page, "automated_speech_recognition", "fake_echo")

    page.get_by_role("button", name="Record", exact=True).click()
    expect(page.locator(".recording")).to_contain_text(re.compile(r"0\.[3-9] s"))
    page.get_by_role("button", name="Stop recording").click()

    expect(page.get_by_role("list", name="Chosen for Audio")).to_contain_text("recording.wav")
    expect(run(page).locator("[data-kind=text]")).to_have_text(re.compile(r"\d{4,} samples at (44100|48000) Hz"))


def test_config_has_a_field_for_each_key_that_the_model_takes(
    site: MakeSite, open_page: OpenPage, plugin: Callable[..., None]
) -> None:
    plugin("models", "optional", LISTING)
    page = open_page(site())
    choose(page, "image_captioning", "optional")
    page.get_by_label("Image", exact=True).set_input_files(RED_FILE)
    page.locator(".config summary").click()

    page.locator("#config-n").fill("3")
    page.get_by_label("Loud").select_option("Yes")

    expect(run(page)).to_contain_text("[('loud', True), ('n', 3)]")


def test_config_of_a_model_that_takes_anything_is_json(site: MakeSite, open_page: OpenPage) -> None:
    page = open_page(site())
    choose(page, "image_captioning", "fake_echo")
    page.get_by_label("Image", exact=True).set_input_files(RED_FILE)

    page.get_by_label("Config").fill("{oops")
    page.get_by_role("button", name="Run", exact=True).click()

    expect(page.get_by_role("alert")).to_contain_text("Config is not valid JSON")
    expect(page.get_by_label("Config")).to_be_focused()


def test_config_can_be_filled_in_once_it_is_known_what_the_model_takes(
    site: MakeSite, open_page: OpenPage, plugin: Callable[..., None]
) -> None:
    plugin("models", "optional", LISTING)
    page = open_page(site())
    asked: list[Route] = []
    page.route("**/models/optional", lambda route: asked.append(route))
    choose(page, "image_captioning", "optional")
    # What the model that was chosen before takes, if that is known by now.
    expect(page.locator("#field-config, .config :is(input, select, textarea)").first).to_be_disabled()
    while not asked:
        page.wait_for_timeout(10)

    asked[0].continue_()

    page.locator(".config summary").click()
    expect(page.locator("#config-n")).to_be_enabled()


# The same request elsewhere


@pytest.mark.parametrize("with_file", [True, False], ids=["with a file", "without"])
def test_commands_get_the_answer_that_the_page_got(
    site: MakeSite, open_page: OpenPage, plugin: Callable[..., None], tmp_path: Path, with_file: bool
) -> None:
    plugin("tasks", "note", NOTE)
    plugin("models", "noter", NOTER)
    page = open_page(site())
    choose(page, "note", "noter")
    if with_file:
        (tmp_path / "a, b;'c'.png").write_bytes(RED)
        page.locator("#field-image").set_input_files(tmp_path / "a, b;'c'.png")
    page.get_by_label("Text", exact=True).fill('it\'s a "test"; @$HOME\né <x')
    page.get_by_label("Classes", exact=True).fill("cat\n@dog")
    run(page)
    answer = json.loads(command(page, "JSON"))

    by_curl = output_of("bash", "-c", command(page, "curl"), folder=tmp_path)
    by_python = output_of(sys.executable, "-c", command(page, "Python"), folder=tmp_path)

    picture = "40x30" if with_file else "nothing"
    assert answer == f"{picture} it's a \"test\"; @$HOME\né <x ['cat', '@dog']"
    assert json.loads(by_curl) == answer
    assert by_python == f"{answer}\n"


def output_of(*arguments: str, folder: Path) -> str:
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_command_can_be_copied(site: MakeSite, open_page: OpenPage) -> None:
    page = open_page(site(), permissions=["clipboard-read", "clipboard-write"])
    choose(page, "fake_shout", "fake_echo")
    page.get_by_label("Text", exact=True).fill("hello")
    run(page)
    shown = command(page, "curl")

    page.get_by_role("tabpanel", name="curl").get_by_role("button", name="Copy").click()

    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == shown
    assert shlex.split(shown)[:2] == ["curl", "-s"]


# Models


def test_model_is_started_and_stopped_and_tells_how_long_it_has_been_loading(
    site: MakeSite, open_page: OpenPage
) -> None:
    page = open_page(site(FAKE_LOAD_SECONDS="2"))
    choose(page, "image_captioning", "fake_slow")
    row = page.locator("[data-model=fake_slow]")
    expect(row).to_contain_text("stopped")

    row.get_by_role("button", name="Start fake_slow").click()

    expect(row).to_contain_text(re.compile("loading 1 s"))
    expect(row).to_contain_text("running")
    expect(page.get_by_role("status")).to_have_text("fake_slow is running")
    row.get_by_role("button", name="Stop fake_slow").click()
    expect(row).to_contain_text("stopped")


def test_page_tells_while_a_request_waits_for_its_model_to_load(site: MakeSite, open_page: OpenPage) -> None:
    page = open_page(site(FAKE_LOAD_SECONDS="1.5"))
    choose(page, "image_captioning", "fake_slow")
    page.get_by_label("Image", exact=True).set_input_files(RED_FILE)

    page.get_by_role("button", name="Run", exact=True).click()

    expect(page.locator("#progress")).to_have_text(re.compile("fake_slow is loading… 1 s"))
    expect(page.get_by_role("tabpanel", name="Answer")).to_contain_text("40 in a batch of 1")


def test_page_tells_how_many_requests_wait_and_lets_go_of_one(
    site: MakeSite, open_page: OpenPage, plugin: Callable[..., None]
) -> None:
    plugin("models", "blocked", BLOCKED)
    url = site()
    pages = [open_page(url) for _ in range(2)]
    for page in pages:
        choose(page, "image_captioning", "blocked")
        page.get_by_label("Image", exact=True).set_input_files(RED_FILE)
        page.get_by_role("button", name="Run", exact=True).click()
    row = pages[1].locator("[data-model=blocked]")
    expect(row).to_contain_text("1 waiting, 1 at work")

    pages[1].get_by_role("button", name="Cancel").click()

    expect(pages[1].get_by_role("button", name="Run", exact=True)).to_be_visible()
    expect(row).not_to_contain_text("waiting")
    importlib.import_module("feature_extraction_server.models.blocked").release.set()
    expect(pages[0].get_by_role("tabpanel", name="Answer")).to_contain_text("done")


def test_model_tells_what_it_is_and_how_it_is_set(site: MakeSite, open_page: OpenPage) -> None:
    page = open_page(site(BLIP_CHECKPOINT="my/blip"))
    choose(page, "image_captioning", "blip")

    page.get_by_text("BLIP: captions of images").click()

    expect(page.locator("#model-details")).to_contain_text("BLIP_CHECKPOINTmy/blip")


# What goes wrong


def test_error_shows_the_server_s_own_sentence_and_leads_to_the_field_at_fault(
    site: MakeSite, open_page: OpenPage
) -> None:
    page = open_page(site())
    choose(page, "image_captioning", "fake_echo")
    page.get_by_label("Image", exact=True).set_input_files([RED_FILE, file("no.png", b"no picture", "image/png")])

    page.get_by_role("button", name="Run", exact=True).click()

    expect(page.get_by_role("alert")).to_have_text("image[1] is not an image of a known format")
    expect(page.get_by_label("Image", exact=True)).to_be_focused()
    expect(page.get_by_label("Image", exact=True)).to_have_attribute("aria-invalid", "true")
    assert "red.png" in command(page, "curl")


def test_model_that_failed_says_why_in_its_row(site: MakeSite, open_page: OpenPage) -> None:
    page = open_page(site())
    choose(page, "image_captioning", "fake_broken")

    page.get_by_role("button", name="Start fake_broken").click()

    expect(page.locator("[data-model=fake_broken]")).to_contain_text(
        re.compile("failed.*RuntimeError: no weights here")
    )


def test_missing_input_is_told_without_asking_the_server(site: MakeSite, open_page: OpenPage) -> None:
    page = open_page(site())
    choose(page, "image_captioning", "fake_echo")

    page.get_by_role("button", name="Run", exact=True).click()

    expect(page.get_by_role("alert")).to_have_text("Image is missing.")


def test_server_that_has_gone_is_told(site: MakeSite, open_page: OpenPage) -> None:
    page = open_page(site())
    choose(page, "fake_shout", "fake_echo")
    page.get_by_label("Text", exact=True).fill("hello")
    page.context.set_offline(True)

    page.get_by_role("button", name="Run", exact=True).click()

    expect(page.get_by_role("alert")).to_have_text("The server cannot be reached.")


def failing(message: str, status: int = 500, code: str = "error", **headers: str) -> Callable[[Route], None]:
    body = json.dumps({"error": message, "code": code})
    return lambda route: route.fulfill(status=status, content_type="application/json", headers=headers, body=body)


def test_answer_stays_when_what_the_page_asks_besides_fails(site: MakeSite, open_page: OpenPage) -> None:
    page = open_page(site())
    choose(page, "fake_shout", "fake_echo")
    expect(page.locator("#model-details details")).to_be_visible()
    page.get_by_label("Text", exact=True).fill("hello")
    page.route("**/api/models/fake_echo", failing("no details today"))

    page.get_by_role("button", name="Run", exact=True).click()

    expect(page.get_by_role("alert")).to_have_text("no details today")
    expect(page.get_by_role("tabpanel", name="Answer")).to_have_text("HELLO!")
    expect(page.locator("#took")).to_contain_text("fake_echo")
    assert '"HELLO!"' in command(page, "JSON")


def test_answer_goes_when_the_next_request_fails(site: MakeSite, open_page: OpenPage) -> None:
    page = open_page(site())
    choose(page, "fake_shout", "fake_echo")
    page.get_by_label("Text", exact=True).fill("hello")
    answer = run(page)
    page.route("**/features", failing("no answers any more"))

    page.get_by_role("button", name="Run", exact=True).click()

    expect(page.get_by_role("alert")).to_have_text("no answers any more")
    expect(answer).to_be_empty()
    expect(page.locator("#panel-json, #took")).to_have_text(["", ""])


def test_page_loads_though_it_asks_for_more_at_once_than_it_may(site: MakeSite, open_page: OpenPage) -> None:
    page = open_page(site(RATE_LIMIT="10", RATE_LIMIT_BURST="3"))

    expect(page.locator("[data-model]").first).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.get_by_label("Task", exact=True).get_by_role("option", name="Fake shout")).to_be_attached()


def test_request_waits_for_its_turn_where_the_page_has_asked_for_much(site: MakeSite, open_page: OpenPage) -> None:
    page = open_page(site())
    choose(page, "fake_shout", "fake_echo")
    page.get_by_label("Text", exact=True).fill("hello")
    page.route("**/features", failing("too many requests", 429, "rate_limited", **{"Retry-After": "1"}), times=1)

    expect(run(page)).to_have_text("HELLO!")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_request_that_waits_for_its_turn_can_be_cancelled(site: MakeSite, open_page: OpenPage) -> None:
    page = open_page(site())
    choose(page, "fake_shout", "fake_echo")
    page.get_by_label("Text", exact=True).fill("hello")
    page.route("**/features", failing("too many requests", 429, "rate_limited", **{"Retry-After": "30"}))
    with page.expect_response("**/features"):
        page.get_by_role("button", name="Run", exact=True).click()

    page.get_by_role("button", name="Cancel").click()

    expect(page.get_by_role("button", name="Run", exact=True)).to_be_visible(timeout=20_000)
    expect(page.get_by_role("alert")).to_have_count(0)


@pytest.mark.parametrize(
    ("code", "retry_after", "n_sent"),
    [
        pytest.param("rate_limited", "0", 21, id="no turn comes"),
        pytest.param("rate_limited", "3600", 1, id="the turn comes in an hour"),
        pytest.param("queue_full", "0", 1, id="full queue"),
    ],
)
def test_refusal_is_told_where_waiting_does_not_help(
    site: MakeSite, open_page: OpenPage, code: str, retry_after: str, n_sent: int
) -> None:
    page = open_page(site())
    choose(page, "fake_shout", "fake_echo")
    page.get_by_label("Text", exact=True).fill("hello")
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if request.url.endswith("/features") else None)
    page.route("**/features", failing("not now", 429, code, **{"Retry-After": retry_after}))

    page.get_by_role("button", name="Run", exact=True).click()

    expect(page.get_by_role("alert")).to_have_text("not now")
    assert len(sent) == n_sent


def test_page_asks_for_the_key_that_the_server_wants_and_shows_it_nowhere(site: MakeSite, open_page: OpenPage) -> None:
    page = open_page(site(API_KEYS="s3same"))
    expect(page.get_by_role("alert").first).to_contain_text("API key")

    page.get_by_label("API key").fill("s3same")
    page.get_by_role("button", name="Use").click()
    choose(page, "fake_shout", "fake_echo")
    page.get_by_label("Text", exact=True).fill("hello")

    expect(run(page)).to_contain_text("HELLO!")
    assert "Authorization: Bearer YOUR_API_KEY" in command(page, "curl")
    assert "s3same" not in page.content()


def test_key_that_no_request_can_have_is_not_taken(site: MakeSite, open_page: OpenPage) -> None:
    page = open_page(site(API_KEYS="s3same"))
    key = page.get_by_label("API key")
    key.fill("ключ")
    key.press("Enter")

    expect(key).to_be_focused()
    assert key.evaluate("element => element.validity.patternMismatch")
    assert page.evaluate("sessionStorage.length") == 0
    key.fill("s3same")
    key.press("Enter")
    expect(page.locator("[data-model]").first).to_be_visible()


# Where and how it is used


def test_page_asks_no_other_host_and_is_not_let_to(site: MakeSite, open_page: OpenPage) -> None:
    url = site()
    page = open_page("about:blank")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    response = page.goto(url)
    choose(page, "image_captioning", "fake_echo")
    page.get_by_label("Image", exact=True).set_input_files(RED_FILE)
    run(page)

    assert response is not None
    assert {address for address in asked if not address.startswith((url, f"blob:{url}"))} == set()
    policy = response.headers["content-security-policy"]
    assert set(re.findall(r"(?:default|script|style|connect)-src ([^;]+)", policy)) == {"'none'", "'self'"}


def strip_prefix(app: Any) -> Any:
    """Serve as a proxy does that hands on what is below its prefix, and does not tell the app."""

    def stripped(environ: dict[str, Any], start_response: Any) -> Any:
        prefix, path = environ["PATH_INFO"][:4], environ["PATH_INFO"][4:]
        if prefix != "/fes":
            start_response("404 Not Found", [])
            return [b""]
        return app(environ | {"PATH_INFO": path}, start_response)

    return stripped


def test_page_works_below_a_prefix(site: MakeSite, open_page: OpenPage) -> None:
    page = open_page(f"{site(strip_prefix)}fes/")
    choose(page, "image_captioning", "fake_echo")
    page.get_by_label("Image", exact=True).set_input_files(RED_FILE)

    expect(run(page)).to_contain_text("40x30")
    assert "/fes/api/tasks/image_captioning/" in command(page, "curl")


def test_everything_can_be_done_by_keyboard(site: MakeSite, open_page: OpenPage) -> None:
    page = open_page(site())
    expect(page.locator("#model-details details")).to_be_visible()
    press = page.keyboard.press

    press("Tab")
    expect(page.get_by_role("link", name="Skip to the input")).to_be_focused()
    page.get_by_label("Task", exact=True).focus()
    page.keyboard.type("Fake")
    expect(page.locator("[data-model=fake_echo] input")).to_be_checked()
    press("Tab")
    expect(page.locator("[data-model=fake_echo] input")).to_be_focused()
    page.get_by_label("Text", exact=True).focus()
    page.keyboard.type("hello")
    press("Control+Enter")
    expect(page.get_by_role("tabpanel", name="Answer")).to_contain_text("HELLO!")
    page.get_by_role("tab", name="Answer").focus()
    press("ArrowRight")
    expect(page.get_by_role("tabpanel", name="JSON")).to_contain_text('"HELLO!"')
    press("End")
    expect(page.get_by_role("tab", name="Python")).to_be_focused()
    expect(page.get_by_role("tabpanel", name="Python")).to_be_visible()


def test_address_of_the_page_names_task_and_model(site: MakeSite, open_page: OpenPage) -> None:
    url = site()
    page = open_page(f"{url}#conditional_image_captioning/fake_echo")

    expect(page.get_by_label("Task", exact=True)).to_have_value("conditional_image_captioning")
    expect(page.locator("[data-model=fake_echo] input")).to_be_checked()
    page.get_by_label("Task", exact=True).select_option("fake_shout")
    expect(page).to_have_url(f"{url}#fake_shout/fake_echo")


def test_page_fits_a_phone_and_brings_the_answer_into_view(
    site: MakeSite, open_page: OpenPage, plugin: Callable[..., None]
) -> None:
    plugin("models", "a_model_with_quite_a_long_name_that_does_not_fit_a_phone", LISTING)
    page = open_page(site(), viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    choose(page, "image_captioning", "fake_echo")
    page.get_by_label("Image", exact=True).set_input_files([RED_FILE, BLUE_FILE])

    answer = run(page)

    expect(answer.locator("li").first).to_be_in_viewport()
    for tab in ("JSON", "curl", "Python"):
        command(page, tab)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


CONTRASTS = """() => {
    const channel = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const ground = (element) => {
        for (; element; element = element.parentElement) {
            const colour = numbers(getComputedStyle(element).backgroundColor);
            if (colour[3] !== 0) return colour;
        }
        return [255, 255, 255];
    };
    const faint = [];
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        if (!own || !element.checkVisibility() || element.closest(".hidden, .skip, :disabled, .box")) continue;
        const colours = [numbers(getComputedStyle(element).color), ground(element)];
        const [dark, light] = colours.map(luminance).sort((a, b) => a - b);
        const contrast = (light + 0.05) / (dark + 0.05);
        if (contrast < 4.5) faint.push(`${element.outerHTML.slice(0, 80)}: ${contrast.toFixed(2)}`);
    }
    return faint;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_enough_contrast_by_day_and_by_night(site: MakeSite, open_page: OpenPage, scheme: str) -> None:
    page = open_page(site(), color_scheme=scheme)
    choose(page, "image_captioning", "fake_echo")
    page.get_by_label("Image", exact=True).set_input_files([RED_FILE, BLUE_FILE])
    run(page)
    page.get_by_role("button", name="Start fake_broken").click()
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.locator("[data-model=fake_broken]")).to_contain_text("failed")

    luminance = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")

    assert (luminance > 200) == (scheme == "light")
    assert page.evaluate(CONTRASTS) == []
