"""The speeds that the documents tell are those that were measured; and the script's own arithmetic."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from benchmarks.model_speeds import (
    ENCODERS,
    MODELS,
    OUTPUT,
    RANDOM,
    BackendRow,
    Row,
    backend_rows,
    build,
    cell,
    merged,
    precision,
    random_weights,
    rounded,
    speed_rows,
    write,
)
from dev_server import ROOT
from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.settings import SettingsManager

MEASURED = speed_rows(OUTPUT.read_text())
TABLE = (ROOT / "README.md").read_text().split("### All models", 1)[1].split("\n#", 1)[0]
SPEED_COLUMN = 6
ONE = Row("one", "text_embedding", "trained", "texts", "70", "150")
OTHER = Row("other", "image_embedding", RANDOM, "images", "9.4", "11")
BACKEND = BackendRow("one", "a text", "63", "130", "2.02", "1.6e-07")


def readme_of(model: str) -> str:
    return (ROOT / "plugins" / f"feature_extraction_server-models-{model}" / "README.md").read_text()


def of(model: str) -> list[Row]:
    return [row for row in MEASURED if row.model == model]


@pytest.mark.parametrize("model", MODELS)
def test_readme_tells_the_speeds_that_were_measured(model: str) -> None:
    (line,) = re.findall(rf"^\| `{model}` \|.*$", TABLE, re.MULTILINE)

    assert line.split("|")[SPEED_COLUMN].strip() == cell(of(model))


@pytest.mark.parametrize("model", sorted({row.model for row in MEASURED if row.single}))
def test_plugin_s_readme_tells_the_speeds_that_were_measured(model: str) -> None:
    assert f"| Speed | a second, on two cores: {cell(of(model))}, " in readme_of(model)


def test_readme_tells_what_onnxruntime_does_for_each_encoder() -> None:
    lines = [row.line() for row in backend_rows(OUTPUT.read_text())]

    assert lines
    assert [line for line in lines if line not in (ROOT / "README.md").read_text()] == []


@pytest.mark.parametrize("model", ENCODERS)
def test_encoder_s_readme_tells_what_onnxruntime_does(model: str) -> None:
    (line,) = re.findall(r"^\| `ENCODER_BACKEND` \|.*$", readme_of(model), re.MULTILINE)
    measured = [row for row in backend_rows(OUTPUT.read_text()) if row.model == model]

    assert len(measured) == 2
    assert all(f" {row.ratio} times" in line and row.difference in line for row in measured)


def options(output: Path, seconds: float = 2.0) -> argparse.Namespace:
    return argparse.Namespace(output=output, seconds=seconds)


def test_rows_of_models_that_a_run_leaves_out_stay(tmp_path: Path) -> None:
    output = tmp_path / "speeds.md"
    write(options(output), "2020-01-01", [ONE, OTHER], [BACKEND])

    write(options(output, seconds=3), "2020-01-02", [replace(ONE, single="71", batch="151")], [])

    assert speed_rows(output.read_text()) == [
        replace(ONE, single="71", batch="151", measured="2020-01-02, 3 s"),
        replace(OTHER, measured="2020-01-01, 2 s"),
    ]
    assert backend_rows(output.read_text()) == [replace(BACKEND, measured="2020-01-01, 2 s")]


def test_rows_of_another_machine_do_not_stay(tmp_path: Path) -> None:
    output = tmp_path / "speeds.md"
    write(options(output), "2020-01-01", [ONE], [BACKEND])
    output.write_text(re.sub(r"\d+ cores", "999 cores", output.read_text()))

    write(options(output), "2020-01-02", [OTHER], [])

    assert speed_rows(output.read_text()) == [replace(OTHER, measured="2020-01-02, 2 s")]
    assert backend_rows(output.read_text()) == []


INTERRUPTED = """
import os, signal, sys, time
from benchmarks import model_speeds

def measure(output):
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(20)
    output.touch()

if __name__ == "__main__":
    model_speeds.run = lambda model, options: model_speeds.in_own_process(measure, options.output)
    sys.exit(model_speeds.main())
"""


def test_measurement_ends_with_its_script(tmp_path: Path) -> None:
    (script := tmp_path / "script.py").write_text(INTERRUPTED)
    command = [sys.executable, str(script), "--models", "blip", "--output", str(tmp_path / "output")]

    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)})

    assert done.returncode == 128 + signal.SIGTERM
    assert not (tmp_path / "output").exists()


def test_a_cell_tells_one_task_a_kind_of_item_and_weights_that_are_trained() -> None:
    zero_shot = Row("one", "zero_shot_image_classification", "trained", "images", "5", "8.9")
    embedding = Row("one", "image_embedding", "trained", "images", "9.3", "13")

    assert cell([zero_shot, ONE, embedding]) == "9.3 / 13 images, 70 / 150 texts (trained)"
    assert cell([OTHER]) == "9.4 / 11 images"
    assert cell([Row("big", "-", "not measured: needs 30 GB of memory", "-", "", "")]) == (
        "not measured: needs 30 GB of memory"
    )
    assert cell([Row("big", "text_embedding", f"{RANDOM}, bfloat16", "texts", "1", "2")]) == "1 / 2 texts (bfloat16)"


@pytest.mark.parametrize(("free_gb", "dtype"), [(64, "float32"), (20, "bfloat16")])
def test_weights_that_have_no_room_are_drawn_in_half_the_precision(
    monkeypatch: pytest.MonkeyPatch, free_gb: int, dtype: str
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free_gb * 1e9))

    assert precision("e5mistral7b_instruct") == dtype


def test_model_that_has_no_room_at_all_is_told_with_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8e9))

    with pytest.raises(MemoryError, match="needs 15 GB of memory"):
        precision("e5mistral7b_instruct")


def test_drawn_weights_are_as_many_as_the_publisher_s(tmp_path: Path) -> None:
    from transformers import Dinov2Model

    build("dino_v2_vits14", tmp_path / "checkpoint")
    settings = {"DINO_V2_VITS14_CHECKPOINT": str(tmp_path / "checkpoint"), "DEVICE": "cpu", "DTYPE": "bfloat16"}
    checkpoint = Checkpoint(SettingsManager(settings, tmp_path / ".env"), "dino_v2_vits14", "owner/name")

    model = random_weights(checkpoint, Dinov2Model)

    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == 22.1
    assert str(model.dtype) == "torch.bfloat16"
    assert not list((tmp_path / "checkpoint").glob("*.safetensors"))


@pytest.mark.parametrize(("number", "told"), [(151.3, "150"), (13.04, "13"), (2.04, "2"), (0.0832, "0.083")])
def test_a_speed_has_two_digits(number: float, told: str) -> None:
    assert rounded(number) == told


def test_a_size_changes_parts_of_a_configuration_and_takes_keys_out() -> None:
    config = {"text_config": {"hidden_size": 32, "eos_token_id": 5}, "id2label": {"0": "cat"}, "stage_names": ["stem"]}

    changed = merged(config, {"text_config": {"hidden_size": 768}, "id2label": {"0": "a"}, "stage_names": None})

    assert changed == {"text_config": {"hidden_size": 768, "eos_token_id": 5}, "id2label": {"0": "a"}}
