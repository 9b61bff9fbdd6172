from __future__ import annotations

from pathlib import Path

import pytest

from feature_extraction_server.core.checkpoints import REPLICA_VARIABLE, Checkpoint
from feature_extraction_server.core.errors import ModelLoadFailed
from feature_extraction_server.core.settings import SettingsManager


def checkpoint(folder: Path, device: str) -> Checkpoint:
    return Checkpoint(SettingsManager({"DEVICE": device}, folder / ".env"), "some", "owner/name")


@pytest.mark.parametrize(
    ("wanted", "replica", "n_devices", "device"),
    [
        ("auto", 0, {"cuda": 0, "mps": 0}, "cpu"),
        ("auto", 0, {"cuda": 0, "mps": 1}, "mps"),
        ("auto", 0, {"cuda": 1, "mps": 1}, "cuda"),
        ("auto", 3, {"cuda": 2}, "cuda:1"),
        ("cuda", 2, {"cuda": 1}, "cuda"),
        ("cuda", 2, {"cuda": 2}, "cuda:0"),
        ("cuda:1", 2, {"cuda": 2}, "cuda:1"),
        ("cpu", 1, {"cuda": 2}, "cpu"),
    ],
)
def test_device_is_the_one_that_is_set_or_the_best_and_replicas_take_turns(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    replica: int,
    n_devices: dict[str, int],
    device: str,
) -> None:
    monkeypatch.setenv(REPLICA_VARIABLE, str(replica))

    assert checkpoint(tmp_path, wanted).device_among(n_devices) == device


@pytest.mark.parametrize("wanted", ["mps", "cuda:2"])
def test_device_that_the_library_cannot_use_is_refused(tmp_path: Path, wanted: str) -> None:
    with pytest.raises(ModelLoadFailed, match=f"DEVICE={wanted}: the model can use no such device here"):
        checkpoint(tmp_path, wanted).device_among({"cuda": 2})
