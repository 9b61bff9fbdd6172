"""The tutorial works: its commands and its code, in their order, in one shell, as somebody who follows it has them."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

import pytest

from dev_server import ROOT
from tests.conftest import free_port

TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()

# Makes the shell's functions: what comes before the commands.
PROLOGUE = """
set -u
trap 'test -z "${SERVER:-}" || { kill "$SERVER"; wait "$SERVER"; }' EXIT
serve() {
    "$@" >"$HARNESS/server.log" 2>&1 &
    SERVER=$!
    until (: <"/dev/tcp/$HARNESS_ADDRESS") 2>/dev/null && fes tasks >/dev/null 2>&1; do
        kill -0 "$SERVER" || { cat "$HARNESS/server.log"; exit 1; }
        sleep 0.05
    done
}
"""


class Block(NamedTuple):
    """A fenced block: its language, its text, and what was last named in backticks before it."""

    language: str
    text: str
    file: str


def blocks() -> list[Block]:
    found, named = [], ""
    for before, language, text in re.findall(r"(.*?)^```(\w+)\n(.*?)^```$", TUTORIAL, re.MULTILINE | re.DOTALL):
        named = [named, *re.findall(r"`([\w./-]+\.py)`", before)][-1]
        found.append(Block(language, text, named))
    return found


def is_to_fail(number: int) -> bool:
    """Tell whether what the tutorial shows after a block is an error."""
    return blocks()[number + 1].text.startswith("fes: ")


def script(folder: Path) -> str:
    """Return the tutorial as a shell script, which prints a line ``@@ number`` after each block that works."""
    lines = [PROLOGUE]
    for number, block in enumerate(blocks()):
        if block.language == "python":
            (folder / f"block-{number}").write_text(block.text)
            lines.append(f'test -f {block.file} && cp "$HARNESS/block-{number}" {block.file}')
        elif block.language == "bash":
            for command in block.text.splitlines():
                lines.append(f"serve {command}" if command.startswith("gunicorn ") else command)
                if command.endswith("bin/activate"):
                    lines.append('sh "$HARNESS/offline"')
                lines.append(f"test $? {'-ne' if is_to_fail(number) else '-eq'} 0 || exit 1")
        lines.append(f'printf "\\n@@ {number}\\n"')
    return "\n".join(lines)


def make_offline(folder: Path) -> None:
    """Write what lets the tutorial's environment see this one's packages, since there is no index to take them from."""
    commands = ["set -eu"]
    for name in ("gunicorn", "pip", "pytest"):
        (entry,) = entry_points(group="console_scripts", name=name)
        code = f"import sys; from {entry.module} import {entry.attr}; sys.exit({entry.attr}())"
        commands.append(f'printf "#!$VIRTUAL_ENV/bin/python\\n{code}\\n" >"$VIRTUAL_ENV/bin/{name}"')
        commands.append(f'chmod +x "$VIRTUAL_ENV/bin/{name}"')
    site = "$(python -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))')"
    commands.append(f'echo "{sysconfig.get_path("purelib")}" >"{site}/dependencies.pth"')
    (folder / "offline").write_text("\n".join(commands))


def follow(tmp_path: Path) -> str:
    """Run the whole tutorial on a terminal, in a checkout of links, and return what it shows."""
    checkout, harness = tmp_path / "checkout", tmp_path / "harness"
    checkout.mkdir()
    harness.mkdir()
    for name in ("feature_extraction_server-core", "feature_extraction_server-client", "plugins"):
        (checkout / name).symlink_to(ROOT / name)
    make_offline(harness)
    port = free_port()
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "HARNESS": str(harness),
        "HARNESS_ADDRESS": f"127.0.0.1/{port}",
        "FES_URL": f"http://127.0.0.1:{port}",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_NO_DEPS": "1",  # they are there, and pip would look for seconds among all the others
        "PIP_NO_INDEX": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # those of this environment are not the reader's
        "TERM": "dumb",
    }
    commands = script(harness).replace(" :5000", f" 127.0.0.1:{port}").replace("localhost:5000", f"127.0.0.1:{port}")
    commands = commands.replace("-m venv ", "-m venv --without-pip ")  # unpacking one takes seconds
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        ["bash", "-c", commands],
        cwd=checkout,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    shown = b""
    with os.fdopen(master, "rb", buffering=0) as file:
        try:
            while data := file.read(4096):
                shown += data
        except OSError:  # how Linux tells that nobody has the terminal open any more
            pass
    process.wait()
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.packaging
@pytest.mark.process
def test_tutorial_shows_what_it_says_line_by_line(tmp_path: Path) -> None:
    shown = follow(tmp_path)

    outputs = re.split(r"\n@@ \d+\n", shown)
    for number, block in enumerate(blocks()):
        assert number + 1 < len(outputs), f"the shell ended with:\n{shown[-5000:]}"
        if block.language == "text":
            pattern = ".*".join(map(re.escape, block.text.strip().split("...")))
            assert re.search(rf"(^|\n){pattern}\s*$", outputs[number - 1], re.DOTALL), (
                f"the tutorial shows\n{block.text}\nbut this is what comes:\n{outputs[number - 1]}"
            )


def test_every_link_of_the_tutorial_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", TUTORIAL)

    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
