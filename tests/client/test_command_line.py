"""The command ``fes``: what it prints, where, and how it ends."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from feature_extraction_server.client import cli
from tests.client.conftest import Answer, Done, Request, ScriptedServer
from tests.conftest import CLIENT, PLUGIN_PATH, Server, free_port
from tests.media_files import recording
from tests.waiting import TIMEOUT_S, wait_until

Fes = Callable[..., Done]
Scripted = Callable[..., ScriptedServer]

README = (CLIENT / "README.md").read_text()
OK: Answer = (200, {}, '["fine"]')
ECHO = ("--model", "fake_echo")
# A model of the tasks that fake_echo lacks.
FINDER = """
def load_model(): pass
def image_classification(image, config): return [{"labels": ["cat"], "scores": [1.0]} for _ in image]
def zero_shot_object_detection(image, classes, config): return [{"boxes": [], "labels": [], "scores": []}]
def optical_character_recognition(image, config): return [[{"text": "a", "box": [0, 0, 1, 1], "confidence": 1.0}]]
def face_embedding(image, config): return [[] for _ in image]
def audio_diarization(audio, config): return [[] for _ in audio]
"""
FINDER_TASKS = (
    "image_classification",
    "zero_shot_object_detection",
    "optical_character_recognition",
    "face_embedding",
    "audio_diarization",
)
ECHO_TASKS = (
    "image_captioning",
    "conditional_image_captioning",
    "zero_shot_image_classification",
    "object_detection",
)


def lines(done: Done) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.out.splitlines()]


def start_process(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(CLIENT)}
    command = [sys.executable, "-m", "feature_extraction_server.client", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, **options)


# Results


@pytest.mark.usefixtures("url")
def test_files_are_answered_in_lines_of_json_in_their_order(fes: Fes, pictures: Path) -> None:
    done = fes("caption", pictures / "b.png", pictures / "a.png", *ECHO)

    assert done.status == 0
    assert lines(done) == [
        {"image": str(pictures / "b.png"), "result": ["20x8 (255, 0, 0)"]},
        {"image": str(pictures / "a.png"), "result": ["10x8 (255, 0, 0)"]},
    ]


@pytest.mark.usefixtures("url")
def test_file_that_fails_is_a_line_among_the_others(fes: Fes, pictures: Path) -> None:
    (pictures / "b.png").write_text("no picture")

    done = fes("caption", pictures, pictures / "nothing.png", *ECHO)

    sentence = "image is not an image of a known format"
    good, bad, also_good, missing = lines(done)
    assert done.status == 1
    assert "result" in good
    assert "result" in also_good
    assert bad == {
        "image": str(pictures / "b.png"),
        "error": sentence,
        "code": "invalid_input",
        "status": 400,
        "field": "image",
    }
    assert missing["code"] == "file_error"
    assert done.err.splitlines()[0] == f"fes: {pictures / 'b.png'}: {sentence}"


@pytest.mark.usefixtures("url")
def test_text_that_is_none_is_the_error_of_its_file_alone(fes: Fes, pictures: Path) -> None:
    files = [pictures / "a.png", pictures / "b.png"]

    done = fes("run", "conditional_image_captioning", "--image", *files, "--text", "\udcff", "--text", "see:", *ECHO)

    bad, good = lines(done)
    assert done.status == 1
    assert (bad["code"], bad["field"]) == ("invalid_input", "text")
    assert good["result"] == ["20x8"]


@pytest.mark.usefixtures("url")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["caption", "a.png"], "10x8 (255, 0, 0)\n"),
        (["caption", "a.png", "--text", "see:"], "10x8\n"),
        (["caption", "a.png", "b.png"], "a.png: 10x8 (255, 0, 0)\nb.png: 20x8 (255, 0, 0)\n"),
        (["transcribe", "a.wav"], "3 samples at 8000 Hz\n"),
        (["classify", "a.png", "--classes", "cat, dog"], " 50.0%  cat\n 50.0%  dog\n"),
        (["classify", "a.png", "--classes", '["a, b"]'], "100.0%  a, b\n"),
        (["detect", "a.png"], "100.0%  picture  0 0 10 8\n"),
        (["detect", "a.png", "b.png"], "a.png: 100.0%  picture  0 0 10 8\nb.png: 100.0%  picture  0 0 20 8\n"),
        (["run", "fake_shout", "--text", "hey"], "HEY!\n"),
        (["run", "fake_shout", "text=hey", "mark=="], "HEY=\n"),
        (["run", "fake_shout", 'text:="hey"'], "HEY!\n"),
        (["run", "image_captioning", "image=@a.png"], "10x8 (255, 0, 0)\n"),
        (["run", "image_captioning", "--image", "a.png", "--config", "{}"], "10x8 (255, 0, 0)\n"),
        (
            ["run", "zero_shot_image_classification", "--image", "a.png", "--classes", "x,y"],
            " 50.0%  x\n 50.0%  y\n",
        ),
        (
            ["run", "conditional_image_captioning", "--image", "a.png", "b.png", "--text", "one:", "--text", "two:"],
            "a.png one:: 10x8\nb.png two:: 20x8\n",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_result_is_text_for_people_where_it_is_asked_for(
    fes: Fes, pictures: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], text: str
) -> None:
    (pictures / "a.wav").write_bytes(recording([0.0] * 3))
    monkeypatch.chdir(pictures)

    done = fes(*arguments, "--no-json", *ECHO)

    assert (done.status, done.out, done.err) == (0, text, "")


def test_embedding_is_shown_by_its_size(fes: Fes, scripted: Scripted, pictures: Path) -> None:
    server = scripted((200, {}, "[0.6, 0, 0.8, 0, 0]"))

    done = fes("embed", pictures / "a.png", "--url", server.url, "--no-json")

    assert done.out == "5 numbers of length 1: [0.6, 0, 0.8, 0, ...]\n"


def test_text_is_embedded(fes: Fes, scripted: Scripted) -> None:
    server = scripted((200, {}, "[1.0]"))

    done = fes("embed", "--text", "a", "--text", "b", "--url", server.url)

    assert lines(done) == [{"text": "a", "result": [1.0]}, {"text": "b", "result": [1.0]}]
    assert {request.path for request in server.requests} == {"/api/tasks/text_embedding/features"}


@pytest.mark.parametrize(
    ("arguments", "answer", "text"),
    [
        (["classify", "a.png"], {"labels": ["cat", "dog"], "scores": [0.75, 0.2]}, " 75.0%  cat\n 20.0%  dog\n"),
        (
            ["detect", "a.png", "--classes", "cat"],
            {"boxes": [[1, 2, 3, 4]], "labels": ["cat"], "scores": [0.5]},
            " 50.0%  cat  1 2 3 4\n",
        ),
        (["read", "a.png"], "two\nlines", "two\nlines\n"),
        (
            ["read", "a.png", "--config", '{"detail": true}'],
            [{"text": "line", "box": [1, 2, 3, 4], "confidence": 0.9}],
            "1 2 3 4  line\n",
        ),
        (
            ["faces", "a.png"],
            [{"box": [1, 2, 30, 40], "score": 2.5, "embedding": [0.6, 0.8]}],
            "1 2 30 40  2.5  2 numbers of length 1: [0.6, 0.8]\n",
        ),
        (
            ["diarize", "a.wav"],
            [{"start": 0.4, "end": 12.5, "speaker": "speaker_0"}],
            "    0.40    12.50  speaker_0\n",
        ),
        (
            ["transcribe", "a.wav", "--timestamps", "segments"],
            {"text": "Good morning.", "segments": [{"start": 0, "end": 1.25, "text": "Good morning."}]},
            "    0.00     1.25  Good morning.\n",
        ),
        (
            ["transcribe", "a.wav", "--timestamps", "words"],
            {"text": "Hi.", "segments": [], "words": [{"start": 0, "end": 1, "text": " Hi."}]},
            "    0.00     1.00  Hi.\n",
        ),
        (["embed", "--query", "a cat"], [0.6, 0.8], "2 numbers of length 1: [0.6, 0.8]\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and isinstance(value[0], str) else "",
)
def test_result_of_each_task_is_text_for_people(
    fes: Fes,
    scripted: Scripted,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    answer: Any,
    text: str,
) -> None:
    (pictures / "a.wav").write_bytes(recording([0.0] * 3))
    monkeypatch.chdir(pictures)
    server = scripted((200, {}, json.dumps(answer)))

    done = fes(*arguments, "--no-json", "--url", server.url)

    assert (done.status, done.out, done.err) == (0, text, "")


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (["classify", "a.png"], "image_classification/features"),
        (["detect", "a.png", "--classes", "cat"], "zero_shot_object_detection/features"),
        (["embed", "--query", "a"], "text_query_embedding/features"),
        (["faces", "a.png", "--meta"], "face_embedding/features?meta=1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_asks_the_route_of_its_task(
    fes: Fes, scripted: Scripted, pictures: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], path: str
) -> None:
    monkeypatch.chdir(pictures)
    server = scripted((200, {}, '{"result": [], "meta": {}}'))

    fes(*arguments, "--url", server.url)

    assert [request.path for request in server.requests] == [f"/api/tasks/{path}"]


def test_times_are_asked_for_along_with_other_config(fes: Fes, scripted: Scripted, pictures: Path) -> None:
    (pictures / "a.wav").write_bytes(recording([0.0] * 3))
    server = scripted(OK)

    fes(
        "transcribe", pictures / "a.wav", "--config", '{"language": "en"}', "--timestamps", "words", "--url", server.url
    )

    assert b'{"language": "en", "timestamps": "words"}' in server.requests[0].body


@pytest.mark.usefixtures("url")
@pytest.mark.parametrize("command", [["caption"], ["run", "image_captioning", "--image"]], ids=["caption", "run"])
def test_origin_comes_with_each_result_where_it_is_asked_for(fes: Fes, pictures: Path, command: list[str]) -> None:
    files = [pictures / "a.png", pictures / "b.png"]

    origins = [line["meta"] for line in lines(fes(*command, *files, *ECHO, "--meta"))]
    shown = fes(*command, files[0], *ECHO, "--meta", "--no-json")

    assert [origin["model"] for origin in origins] == ["fake_echo"] * 2
    assert shown.out == "10x8 (255, 0, 0)\n(fake_echo)\n"


def test_what_a_terminal_would_act_on_is_not_printed(fes: Fes, scripted: Scripted, pictures: Path) -> None:
    server = scripted((200, {}, '["\\u001b[2Jhello"]'))

    done = fes("caption", pictures / "a.png", "--url", server.url, "--no-json")

    assert "hello" in done.out
    assert "\x1b" not in done.out


def test_config_reaches_the_model(fes: Fes, scripted: Scripted, pictures: Path) -> None:
    server = scripted(OK)

    fes("caption", pictures / "a.png", "--config", '{"num_beams": 3}', "--url", server.url)

    assert b'{"num_beams": 3}' in server.requests[0].body


# Inputs


@pytest.mark.usefixtures("url")
@pytest.mark.parametrize(
    ("argument", "names"),
    [(".", ["a.png", "b.png", "c.png"]), ("[ab].png", ["a.png", "b.png"]), ("**/*.png", ["a.png", "b.png", "c.png"])],
    ids=["folder", "pattern", "recursive pattern"],
)
def test_folders_and_patterns_stand_for_their_files(
    fes: Fes, pictures: Path, monkeypatch: pytest.MonkeyPatch, argument: str, names: list[str]
) -> None:
    (pictures / "notes.txt").write_text("no picture")
    monkeypatch.chdir(pictures)

    done = fes("caption", argument, *ECHO)

    assert [line["image"] for line in lines(done)] == names
    assert done.status == 0


def test_standard_input_is_read_for_a_dash(url: str, pictures: Path) -> None:
    with (pictures / "c.png").open("rb") as file:
        process = start_process("caption", "-", "--url", url, *ECHO, stdin=file, stdout=subprocess.PIPE)
        out, _ = process.communicate(timeout=TIMEOUT_S)

    assert json.loads(out) == {"image": "-", "result": ["30x8 (255, 0, 0)"]}


@pytest.fixture
def standard_input(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """``standard_input(content)`` is what the command reads, in a locale that bears with nothing."""
    return lambda content: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8", "strict"))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        pytest.param("Bücher\n".encode(), "Bücher", id="line"),
        pytest.param(b"two\r\nlines\r\n", "two\nlines", id="lines of Windows"),
        pytest.param("\ufeffBücher".encode(), "Bücher", id="mark of the byte order"),
        pytest.param(b"", "", id="nothing"),
    ],
)
def test_text_is_read_from_standard_input_for_a_dash(
    fes: Fes, scripted: Scripted, standard_input: Callable[[bytes], None], content: bytes, text: str
) -> None:
    server = scripted((200, {}, "[1.0]"))
    standard_input(content)

    done = fes("embed", "--text", "-", "--url", server.url)

    assert lines(done) == [{"text": text, "result": [1.0]}]
    assert json.loads(server.requests[0].body) == {"text": text}


@pytest.mark.parametrize(
    ("content", "byte"), [(b"caf\xe9", 3), (b"\xef\xbb\xbfcaf\xe9", 6)], ids=["latin-1", "after a mark"]
)
def test_standard_input_that_is_no_text_is_told(
    fes: Fes, standard_input: Callable[[bytes], None], content: bytes, byte: int
) -> None:
    standard_input(content)

    done = fes("embed", "--text", "-")

    assert (done.status, done.out) == (2, "")
    assert done.err == f"fes: standard input is not UTF-8 text: byte {byte}\n"


def test_name_that_is_no_text_is_printed_all_the_same(url: str, pictures: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    (pictures / "a.png").rename(pictures / name)

    process = start_process("caption", pictures / name, "--url", url, *ECHO, stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=TIMEOUT_S)

    assert json.loads(out)["image"] == str(pictures / name)


@pytest.mark.usefixtures("url")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["caption", "*.gif"], "no file is called like *.gif"),
        (["transcribe", "."], "there is no audio file in ."),
        (["embed"], "name pictures, or a text by --text"),
        (["embed", "--text", "a", "--query", "b"], "name pictures, or a text by --text"),
        (["stop"], "name the models to stop, or --all"),
        (["detect", ".", "--draw", "out.png"], "--draw must be a folder that exists, to draw over 3 pictures"),
        (["detect", "data:,", "--draw", "out.png"], "--draw needs pictures that are files"),
        (
            ["run", "conditional_image_captioning", "--image", ".", "--text", "a", "--text", "b"],
            "image has 3, text has 2",
        ),
        (["caption", "a.png", "--url", "ftp://x"], "'ftp://x' is not the URL of a server"),
        (["caption", "a.png", "--config", "[1]"], "'[1]' is not a JSON object"),
        (["caption", "a.png", "--config", "{"], "'{' is not JSON"),
        (["caption", "a.png", "--concurrency", "0"], "'0' is not a number greater than 0"),
        (["run", "fake_shout", "text"], "'text' is neither an option of the task nor KEY=VALUE"),
        (["run", "fake_shout", "--image", "a.png"], "'a.png' is neither an option of the task nor KEY=VALUE"),
        (["caption"], "the following arguments are required: FILE"),
        (["nothing"], "invalid choice: 'nothing'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_command_line_is_told(
    fes: Fes, pictures: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(pictures)

    done = fes(*arguments)

    assert told in done.err
    assert (done.status, done.out) == (2, "")


# Any task


@pytest.mark.usefixtures("url")
def test_help_of_a_task_lists_its_keys(fes: Fes) -> None:
    done = fes("run", "zero_shot_image_classification", "--help")

    assert done.status == 0
    assert "Match an image to a class" in done.out
    for option in ("--image FILE", "--classes A,B,...", "--config JSON", "--model MODEL"):
        assert option in done.out


def test_task_that_the_server_does_not_describe_takes_pairs(fes: Fes, scripted: Scripted) -> None:
    missing: Answer = (404, {}, '{"error": "there is no route", "code": "not_found"}')
    server = scripted(lambda request: missing if request.path == "/api/tasks/t" else OK)

    done = fes("run", "t", "text=hello", "n:=3", "--url", server.url)

    assert lines(done) == [{"text": "hello", "n": "3", "result": ["fine"]}]
    assert json.loads(server.requests[-1].body) == {"text": "hello", "n": 3}


# Errors that are everyone's


@pytest.mark.usefixtures("url")
@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("nothing", "there is no model 'nothing'"),
        ("\udcff", "there is no model '?'"),
        ("fake_broken", "no weights here"),
    ],
    ids=["unknown model", "name that is no text", "model that cannot be loaded"],
)
def test_error_that_every_file_would_meet_ends_the_command(fes: Fes, pictures: Path, model: str, told: str) -> None:
    done = fes("caption", pictures, "--model", model)

    assert done.status == 1
    assert [told in line["error"] for line in lines(done)] == [True]
    assert told in done.err


def test_command_tells_in_one_line_that_no_server_is_there(fes: Fes, pictures: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"

    done = fes("caption", pictures, "--url", url)

    assert (done.status, done.out) == (3, "")
    assert (
        done.err == f"fes: no server can be reached at {url}: Connection refused (--url or FES_URL says where it is)\n"
    )


def test_api_key_comes_from_the_environment(fes: Fes, scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    server = scripted(OK)
    monkeypatch.setenv("FES_API_KEY", "open sesame")

    fes("plugins", "--url", server.url)

    assert server.requests[0].headers["Authorization"] == "Bearer open sesame"


def test_key_that_no_header_can_have_is_told_in_a_line_without_it(fes: Fes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FES_API_KEY", "сезам")

    done = fes("tasks")

    assert (done.status, done.out) == (2, "")
    assert done.err == "fes: the API key has characters that no header can have\n"


# About the server


@pytest.mark.usefixtures("url")
def test_tasks_and_models_are_listed_with_each_other(fes: Fes) -> None:
    tasks, models = fes("tasks"), fes("models", "--task", "fake_shout")

    assert {"task": "fake_shout", "models": ["fake_echo"]} in lines(tasks)
    assert [(line["model"], line["state"]) for line in lines(models)] == [("fake_echo", "stopped")]
    assert "fake_shout" in lines(models)[0]["tasks"]


@pytest.mark.usefixtures("url")
def test_models_are_started_and_stopped(fes: Fes) -> None:
    started = fes("start", "fake_echo", "fake_slow")
    stopped = fes("stop", "--all")
    unknown = fes("start", "nothing", "fake_echo")

    assert [line["model"] for line in lines(started)] == ["fake_echo", "fake_slow"]
    assert {line["model"] for line in lines(stopped)} == {"fake_echo", "fake_slow"}
    assert unknown.status == 1
    assert "there is no model 'nothing'" in unknown.err
    assert [line["model"] for line in lines(unknown)] == ["fake_echo"]


@pytest.mark.usefixtures("url")
def test_status_is_a_table_for_people(fes: Fes) -> None:
    done = fes("status", "fake_echo", "fake_big", "--no-json")

    assert done.out == "fake_echo  stopped  0 running, 0 waiting\nfake_big   stopped  0 running, 0 waiting\n"


@pytest.mark.usefixtures("url")
def test_plugins_are_listed(fes: Fes) -> None:
    done = fes("plugins", "--no-json")

    assert re.search(r"^models +fake_echo +loaded$", done.out, re.MULTILINE)


# Drawing


@pytest.mark.usefixtures("url")
def test_detections_are_drawn_over_the_upright_picture(fes: Fes, tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (200, 100), "white").save(tmp_path / "street.jpg", exif=turned)

    done = fes("detect", tmp_path / "street.jpg", "--draw", tmp_path / "out.png", *ECHO)

    drawn = Image.open(tmp_path / "out.png")
    assert done.status == 0
    assert drawn.size == (100, 200)
    assert drawn.getpixel((99, 199)) != (255, 255, 255)
    assert drawn.getpixel((50, 150)) == (255, 255, 255)


@pytest.mark.usefixtures("url")
def test_detections_of_many_pictures_are_drawn_into_a_folder(fes: Fes, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (pictures / "more").mkdir()
    (pictures / "c.png").rename(pictures / "more" / "a.png")

    fes("detect", pictures, "--draw", tmp_path / "out", *ECHO)

    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a-2.png", "a.png", "b.png"]


@pytest.mark.usefixtures("url")
def test_file_that_cannot_be_drawn_to_is_that_pictures_error(fes: Fes, pictures: Path) -> None:
    done = fes("detect", pictures / "a.png", "--draw", pictures / "nowhere" / "out.png", *ECHO)

    assert done.status == 1
    assert "No such file or directory" in done.err


def test_drawing_without_pillow_says_how_to_get_it(fes: Fes, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "feature_extraction_server.client.draw", raising=False)

    done = fes("detect", pictures / "a.png", "--draw", "out.png")

    assert done.status == 2
    assert "pip install 'feature_extraction_server-client[draw]'" in done.err


# On a terminal, and how it ends


def test_terminal_gets_text_and_a_progress_bar(url: str, pictures: Path) -> None:
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    process = start_process("caption", pictures, "--url", url, *ECHO, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = read_all(master)

    assert process.wait(TIMEOUT_S) == 0
    assert f"{pictures / 'b.png'}: 20x8 (255, 0, 0)\r\n" in shown
    assert "| 0/3 [" in shown


def read_all(terminal: int) -> str:
    """Read what is written to a terminal until nobody has it open any more."""
    data = b""
    with os.fdopen(terminal, "rb", buffering=0) as file:
        try:
            while block := file.read(4096):
                data += block
        except OSError:  # how Linux tells the end
            pass
    return data.decode()


def test_ctrl_c_ends_at_once_though_requests_run(scripted: Scripted, pictures: Path) -> None:
    end = threading.Event()
    server = scripted(lambda request: None if end.wait(TIMEOUT_S) else OK)
    process = start_process("caption", pictures, "--url", server.url, stderr=subprocess.PIPE)
    wait_until(lambda: len(server.requests) == 3, "the requests")

    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT_S)

    end.set()
    assert process.returncode == -signal.SIGINT
    assert b"Traceback" not in err


def test_closed_pipe_ends_without_a_word(scripted: Scripted, pictures: Path) -> None:
    one_read = threading.Event()

    def answer(request: Request) -> Answer:
        if b"a.png" not in request.body:
            one_read.wait(TIMEOUT_S)
        return OK

    server = scripted(answer)
    process = start_process(
        "caption", pictures, "--url", server.url, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    process.stdout.close()
    one_read.set()
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()

    assert b"a.png" in first
    assert process.wait(TIMEOUT_S) == -signal.SIGPIPE
    assert err == b""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["new-plugin", "task", "my_task"]], ids=["help", "command that succeeds"]
)
class TestOutputThatCannotBeWritten:
    """The standard output that a shell gives may be none, or full; what is written stays in a buffer to the end."""

    def test_closed_pipe_ends_by_the_signal(self, tmp_path: Path, arguments: list[str]) -> None:
        read_end, write_end = os.pipe()
        os.close(read_end)

        with os.fdopen(write_end) as pipe:
            process = start_process(*arguments, cwd=tmp_path, stdout=pipe, stderr=subprocess.PIPE)
            _, err = process.communicate(timeout=TIMEOUT_S)

        assert (process.returncode, err) == (-signal.SIGPIPE, b"")

    def test_full_disk_is_told_in_a_line(self, tmp_path: Path, arguments: list[str]) -> None:
        with open("/dev/full", "wb") as full:
            process = start_process(*arguments, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE)
            _, err = process.communicate(timeout=TIMEOUT_S)

        assert process.returncode == 1
        assert err == b"fes: standard input or output: No space left on device\n"

    def test_closed_output_is_no_error(self, tmp_path: Path, arguments: list[str]) -> None:
        command = shlex.join([sys.executable, "-m", "feature_extraction_server.client", *arguments])
        environment = {"PYTHONPATH": str(CLIENT)}

        done = subprocess.run(
            ["sh", "-c", f"{command} >&-"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, timeout=TIMEOUT_S
        )

        assert (done.returncode, done.stderr) == (0, b"")


def test_full_disk_is_told_once_though_each_result_is_written_at_once(scripted: Scripted, pictures: Path) -> None:
    server = scripted(OK)

    with open("/dev/full", "wb") as full:
        process = start_process("caption", pictures, "--url", server.url, stdout=full, stderr=subprocess.PIPE)
        _, err = process.communicate(timeout=TIMEOUT_S)

    assert process.returncode == 1
    assert err == b"fes: standard input or output: No space left on device\n"


# Documentation


def test_readme_shows_every_command_and_none_besides(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    commands = set(re.findall(r"^    ([a-z-]+) ", capsys.readouterr().out, re.MULTILINE))

    assert set(re.findall(r"^fes ([a-z-]+)", README, re.MULTILINE)) == commands


def test_readme_tells_every_exit_status_of_the_help() -> None:
    told = set(re.findall(r"^\| ([\d, ]+) \|", README, re.MULTILINE))

    assert told == {"0", "1", "2", "3", "130, 141"}
    assert all(f"{status} " in cli.EPILOG for status in "0123")


@pytest.mark.process
def test_readmes_commands_work_against_a_real_server(
    gunicorn: Callable[..., Server], plugin: Callable[[str, str, str], None], tmp_path: Path
) -> None:
    plugin("models", "fake_finder", FINDER)
    models = dict.fromkeys(ECHO_TASKS, "fake_echo") | dict.fromkeys(FINDER_TASKS, "fake_finder")
    models["automated_speech_recognition"] = "fake_scribe"
    settings = {f"DEFAULT_MODEL_{task.upper()}": model for task, model in models.items()}
    settings["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "plugins"), *PLUGIN_PATH])
    server = gunicorn("-k", "gthread", "--threads", "8", **settings)
    (tmp_path / "talk.mp3").write_bytes(recording([0.0] * 400, "MP3", "MPEG_LAYER_III"))
    for name in ("cat.jpg", "street.jpg", "page.png", "people.jpg"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / name)
    commands = re.findall(r"^(fes (?!new-plugin|embed|caption photos).*?)(?: +#.*)?$", README, re.MULTILINE)
    script = "\n".join(
        [
            "set -eu",
            f'fes() {{ "{sys.executable}" -m feature_extraction_server.client "$@"; }}',
            f"export FES_URL={server.url} PYTHONPATH={CLIENT}",
            *(command.replace(', "num_beams": 3', "").replace('{"num_beams": 3}', "{}") for command in commands),
        ]
    )

    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S)

    assert len(commands) > 10
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out.png").exists()
