"""``gunicorn.conf.py``: what it says, and what NUMBER_OF_WORKERS may be."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dev_server import ROOT
from tests.conftest import server_environment


def print_config(folder: Path, *options: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gunicorn", "--print-config", *options],
        cwd=ROOT,
        env=server_environment(folder, **settings),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("settings", "workers"),
    [
        pytest.param({}, "1", id="unset"),
        pytest.param({"NUMBER_OF_WORKERS": ""}, "1", id="empty"),
        pytest.param({"NUMBER_OF_WORKERS": "3"}, "3", id="given"),
    ],
)
def test_number_of_workers_is_read_from_the_environment(tmp_path: Path, settings: dict[str, str], workers: str) -> None:
    done = print_config(tmp_path, **settings)

    assert done.returncode == 0, done.stderr
    assert re.search(rf"^workers\s+= {workers}$", done.stdout, re.MULTILINE)


def test_command_line_goes_before_the_configuration_file(tmp_path: Path) -> None:
    done = print_config(tmp_path, "-w", "4", NUMBER_OF_WORKERS="3")

    assert re.search(r"^workers\s+= 4$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "two"])
def test_bad_number_of_workers_is_told_in_one_line_with_status_2(tmp_path: Path, value: str) -> None:
    done = print_config(tmp_path, NUMBER_OF_WORKERS=value)

    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert f"NUMBER_OF_WORKERS='{value}'" in line
    assert "at least 1" in line


def test_configuration_names_the_app_and_lets_requests_share_a_worker(tmp_path: Path) -> None:
    printed = " ".join(print_config(tmp_path).stdout.split())

    assert "wsgi_app = feature_extraction_server.flask.entrypoint:entrypoint()" in printed
    assert "worker_class = feature_extraction_server.flask.worker.Worker" in printed
    assert "threads = 1100" in printed
