"""The soak test's script, run for seconds; ``make soak`` runs it for minutes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak import Record, Request, report
from dev_server import ROOT
from tests.conftest import server_environment


def record_of(growth_a_sample: float) -> Record:
    samples = [{("engine", "MiB"): 40 + growth_a_sample * index} for index in range(100)]
    return Record(samples=samples)


@pytest.mark.process
def test_a_short_soak_finds_nothing_wrong(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--minutes", "0.06"]

    done = subprocess.run(
        command, cwd=tmp_path, env=server_environment(tmp_path), capture_output=True, text=True, timeout=120
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "violations: 0" in done.stdout


@pytest.mark.parametrize(("growth", "n_violations"), [(0.1, 0), (1.0, 1)], ids=["slow", "fast"])
def test_growth_beyond_what_is_allowed_is_a_violation(growth: float, n_violations: int) -> None:
    record = record_of(growth)

    text = report(record, minutes=1)

    assert len(record.violations) == n_violations
    assert f"violations: {n_violations}" in text


@pytest.mark.parametrize(
    ("outcome", "n_violations"),
    [
        ("200", 0),
        ("503 model_unavailable", 0),
        ("500 model_error", 1),
        ("wrong answer: 41x9", 1),
        ("lost: ConnectionResetError", 1),
    ],
)
def test_outcome_that_nothing_accounts_for_is_a_violation(outcome: str, n_violations: int) -> None:
    record = Record()

    record.add(Request("fake_echo", "{}", "40x9", frozenset({"200", "503 model_unavailable"})), outcome)

    assert len(record.violations) == n_violations
