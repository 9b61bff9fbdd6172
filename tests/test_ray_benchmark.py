"""What benchmarks/ray_cluster.py works out of its measurements, and what it writes. It measures nothing here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.bench import is_running
from benchmarks.capacity import costs_of
from benchmarks.ray_cluster import FINDINGS, PARTS, Cluster, costs, machine_of, main, tables


def measured(p50_ms: float, engine_ms: float, requests_a_call: float) -> dict[str, Any]:
    load = {"requests_per_s": 100.0, "p50_ms": p50_ms, "p99_ms": 2 * p50_ms, "n_errors": 0}
    return load | {"web_ms": 0.7, "engine_ms": engine_ms, "all_ms": 12.0, "requests_a_call": requests_a_call}


OVERHEAD = {
    "engine_1": measured(1.0, 0.2, 1),
    "engine_32": measured(20.0, 0.15, 10),
    "ray_idle_cores": 0.2,
    "ray_1": measured(9.0, 3.2, 1),
    "ray_32": measured(25.0, 0.5, 10),
}


def test_costs_of_a_request_and_of_a_call_are_told_apart() -> None:
    found = costs(OVERHEAD)

    # 0.2 ms a request and 3 ms a call: 3.2 ms for a call of one, 0.5 ms a request for calls of ten.
    assert found == {"web_ms": 0.7, "engine_ms": 0.2, "call_ms": 3.0, "network_ms": 5.0}


def test_what_a_call_takes_elsewhere_than_in_the_server_is_told() -> None:
    found = machine_of(OVERHEAD)

    assert found["idle_cores"] == 0.2
    assert found["remote_ms"] == pytest.approx(12.0 - 0.7 - 3.2)


def test_replicas_are_compared_with_as_many_times_one() -> None:
    points = [
        {"replicas": n, "max_batch_size": 1, "texts_a_request": 1, "connections": 4 * n, "items_a_call": 1.0}
        | {"cores_busy": 1.0}
        | measured(200, 0, 1)
        | {"requests_per_s": rate}
        for n, rate in ((1, 20.0), (2, 38.0))
    ]

    rows = [line.split(" | ") for line in tables({"scaling": points}) if line.startswith("| 1 |")]

    assert [row[-1] for row in rows] == ["1.00 |", "0.95 |"]


def test_difference_to_the_engine_is_told() -> None:
    assert "| 1 | difference |  | +8.00 | +16.00 |  |  |" in tables({"overhead": OVERHEAD})


def test_part_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--parts", "weather"])

    assert "invalid choice" in capsys.readouterr().err


def test_kept_findings_are_what_the_simulation_reads() -> None:
    known = json.loads(FINDINGS.read_text())

    assert costs_of(known["costs"]).replica_ms(1) == 50
    assert known["ray"].keys() <= PARTS.keys()


def has_ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or not is_running(psutil.Process(pid))


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A program in the place of ``ray``, which starts a process and ends; the file with that process's number."""
    script, child = tmp_path / "ray", tmp_path / "child"
    script.write_text(f"#!/bin/sh\nsleep 1000 &\necho $! > {child}.new\nmv {child}.new {child}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    return child


def test_a_cluster_that_does_not_start_is_told_of_and_leaves_nothing(ray: Path) -> None:
    with pytest.raises(SystemExit, match="did not start"):
        Cluster()

    assert has_ended(int(ray.read_text()))


def test_a_cluster_whose_start_is_interrupted_leaves_nothing(ray: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = ray.with_name("ray")
    script.write_text(f"{script.read_text()}wait\n")

    def interrupt_once_it_runs(_: Cluster) -> str:
        if ray.exists():
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(Cluster, "log", interrupt_once_it_runs)

    with pytest.raises(KeyboardInterrupt):
        Cluster()

    assert has_ended(int(ray.read_text()))
