"""``.env.example`` and ``dev_server.py --help`` document every setting, those of all plugins included."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dev_server import ROOT

# Runs the development server up to where it reads its command line: by then, all settings are declared.
_SETTINGS = """
import json, sys
from dev_server import ROOT
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.flask.dev_server import main

def report(settings, arguments, description):
    told = [(s.name, s.description, s.allowed(), s.default) for s in settings.all()]
    sys.exit(print(json.dumps(told)))

SettingsManager.read_command_line = report
main([])
"""
# Read by gunicorn.conf.py, before the server's own settings are there.
NUMBER_OF_WORKERS = ["NUMBER_OF_WORKERS", "How many workers gunicorn runs", "a whole number of at least 1", 1]


def run_python(*arguments: str) -> str:
    """Run Python in the checkout, with no plugin on its path but those of the checkout."""
    environment = {"PATH": os.environ["PATH"], "COLUMNS": "100000"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def settings() -> list[list[Any]]:
    """Name, description, allowed values and default of every setting of the development server."""
    told: list[list[Any]] = json.loads(run_python("-c", _SETTINGS))
    names = [name for name, *_ in told]
    by_model = re.compile(rf"({'|'.join(names)}) of the model \S+, in place of what holds for all")
    return [one for one in told if not by_model.match(one[1])]


def entry(name: str, description: str, allowed: str, default: object) -> str:
    return f"# {description} ({allowed})\n#{name}={'' if default is None else default}\n"


def documented() -> dict[str, str]:
    """Return the entries of ``.env.example`` by the setting's name."""
    found = re.findall(r"^(# .+\n#([A-Z0-9_]+)=.*\n)", (ROOT / ".env.example").read_text(), re.MULTILINE)
    return {name: text for text, name in found}


def test_env_example_has_an_entry_for_each_setting_with_its_description_and_default(settings: list[list[Any]]) -> None:
    expected = {name: entry(name, *rest) for name, *rest in [*settings, NUMBER_OF_WORKERS]}

    missing = [text for name, text in expected.items() if documented().get(name) != text]

    assert not missing, "entries that are missing or differ:\n" + "\n".join(missing)
    assert documented().keys() == expected.keys()


def test_env_example_changes_no_setting_when_it_is_copied_as_it_is() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()

    assert [line for line in lines if line and not line.startswith("#")] == []


def test_help_lists_each_setting_with_its_description_and_default(settings: list[list[Any]]) -> None:
    text = run_python("dev_server.py", "--help")

    for name, description, _, default in settings:
        option = "--" + name.lower().replace("_", "-")
        (line,) = re.findall(rf"^  {option} VALUE\s+(.+)$", text, re.MULTILINE)
        assert line.startswith(description)
        assert line.endswith(f"default: {'none' if default is None else default})")


def test_settings_named_in_the_example_file_are_read_from_a_dotenv_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text((ROOT / ".env.example").read_text().replace("#LOG_LEVEL=INFO", "LOG_LEVEL=LOUD"))

    done = subprocess.run(
        [sys.executable, str(ROOT / "dev_server.py")], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 2
    assert "LOG_LEVEL='LOUD'" in done.stderr
