"""schemathesis tries every route of a real server, with what its description allows and with what it forbids."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dev_server import SOURCES
from tests.conftest import FAKES, Server

pytestmark = pytest.mark.process

# Not all that makes sense can be said in JSON schema.
HOOKS = """
import schemathesis
from hypothesis import strategies
from feature_extraction_server.core.task import AudioField, ImageField

MEDIA = {field.schema["contentMediaType"]: field.schema["examples"] for field in (AudioField, ImageField)}
MEDIA["text/plain"] = ["data:text/plain;charset=utf-8,YSB0ZXh0"]
for name, examples in MEDIA.items():
    schemathesis.openapi.format(name, strategies.sampled_from(examples))

@schemathesis.hook
def before_load_schema(context, raw_schema):
    "Which texts are to be pictures and recordings. A file alone as the body is more than schemathesis can send."
    for path, item in raw_schema["paths"].items():
        if path.endswith("/jobs") and "post" in item:  # what a form's files are worth shows when the job is run
            item["post"]["requestBody"]["content"].pop("multipart/form-data", None)
    parts = [raw_schema]
    while parts:
        part = parts.pop()
        for name in {"image/*", "audio/*"} & part.keys() if isinstance(part, dict) else ():
            del part[name]
        parts.extend(part.values() if isinstance(part, dict) else part if isinstance(part, list) else [])
        if isinstance(part, dict) and part.get("contentMediaType") in MEDIA:
            part["format"] = part["contentMediaType"]

@schemathesis.hook
def filter_body(context, body):
    "Lists of one request must be equally long, and of texts: a form can say no other item."
    keys = {"image", "audio", "text"} & body.keys() if isinstance(body, dict) else set()
    lists = [body[key] for key in keys if isinstance(body[key], list)]
    return len(set(map(len, lists))) <= 1 and all(isinstance(item, str) for items in lists for item in items)
"""
# The routes that run a task are the same for every task: two tasks of them will do.
SAME_ROUTES = r"/tasks/(?!conditional_image_captioning|fake_shout|\{)\w+/"


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PYTHONPATH with the apis and tasks, and with one fake model: the others fail or dawdle on purpose."""
    for name in ("models/fake_echo.py", "tasks/fake_shout.py"):
        target = tmp_path / "fakes" / "feature_extraction_server" / name
        target.parent.mkdir(parents=True)
        shutil.copy(FAKES / "feature_extraction_server" / name, target)
    sources = [source for source in SOURCES if "-models-" not in source.name]
    return os.pathsep.join(map(str, [*sources, tmp_path / "fakes"]))


def test_schemathesis_finds_nothing(gunicorn: Callable[..., Server], path: str, tmp_path: Path) -> None:
    (tmp_path / "hooks.py").write_text(HOOKS)
    server = gunicorn("--threads", "4", PYTHONPATH=path)
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    options = ["--seed", "1", "--max-examples", "8", "--exclude-path-regex", SAME_ROUTES, "--no-color"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{path}", "SCHEMATHESIS_HOOKS": "hooks"}

    done = subprocess.run(
        [*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )

    assert done.returncode == 0, done.stdout + done.stderr
