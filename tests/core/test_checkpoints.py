from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from feature_extraction_server.core.checkpoints import REPLICA_VARIABLE, Checkpoint
from feature_extraction_server.core.errors import ModelLoadFailed
from feature_extraction_server.core.settings import SettingsManager
from tests.hub import Hub, commit, running_hub

FILES = ("config.json", "*.bin")


def checkpoint(folder: Path, device: str) -> Checkpoint:
    return Checkpoint(SettingsManager({"DEVICE": device}, folder / ".env"), "some", "owner/name", files=FILES)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the checkpoint, which this process has, with a cache of the test's own."""
    from huggingface_hub import constants

    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        url = hub.url + "/{repo_id}/resolve/{revision}/{filename}"  # made from the other when the library is imported
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        (folder := tmp_path / "repository").mkdir()
        (folder / "config.json").write_bytes(b"{}")
        (folder / "model.bin").write_bytes(bytes(100))
        hub.add("owner/name", folder)
        yield hub


def wait_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the hub's library wait briefly for an answer, and not at all before it asks again."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    name = "feature_extraction_server.core.checkpoints"
    return [
        record.getMessage() for record in caplog.records if (record.name, record.levelno) == (name, logging.WARNING)
    ]


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


@pytest.mark.parametrize("part", ["/revision/", "/tree/"])
def test_hub_that_answers_the_first_request_and_then_stalls_fails_the_load(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    wait_briefly(monkeypatch)
    hub.stall(part)

    with pytest.raises(ModelLoadFailed, match=r"could not be had from the Hugging Face hub: .*timed out"):
        checkpoint(tmp_path, "cpu").download()


def test_offline_mode_still_asks_nobody(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    checkpoint(tmp_path, "cpu").pull()
    hub.fail("/", 404)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert checkpoint(tmp_path, "cpu").download().name == commit("owner/name", "main")
    with pytest.raises(ModelLoadFailed, match="offline mode is enabled"):
        checkpoint(tmp_path, "cpu").pull()


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_what_is_cached_loads_while_the_hub_answers_with_an_error(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    pulled = checkpoint(tmp_path, "cpu").pull()
    hub.fail("/api/", status)

    loaded = checkpoint(tmp_path, "cpu")

    assert loaded.download() == pulled
    assert loaded.revision == commit("owner/name", "main")
    (warning,) = warnings(caplog)
    assert str(status) in warning
    with pytest.raises(ModelLoadFailed, match=str(status)):
        checkpoint(tmp_path, "cpu").pull()


def test_what_is_cached_loads_while_the_hub_stalls(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pulled = checkpoint(tmp_path, "cpu").pull()
    wait_briefly(monkeypatch)
    hub.stall("/api/")

    assert checkpoint(tmp_path, "cpu").download() == pulled
    (warning,) = warnings(caplog)
    assert "timed out" in warning


@pytest.mark.parametrize("cached", ["nothing", "a part"])
def test_hub_that_answers_with_an_error_is_the_reason_where_not_all_is_cached(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture, cached: str
) -> None:
    if cached == "a part":
        (checkpoint(tmp_path, "cpu").pull() / "model.bin").unlink()
    hub.fail("/api/", 503)

    with pytest.raises(ModelLoadFailed, match=r"SOME_CHECKPOINT=owner/name could not be had .*503") as failure:
        checkpoint(tmp_path, "cpu").download()

    assert "cannot be reached" not in str(failure.value)
    assert warnings(caplog) == []


def test_checkpoint_that_the_hub_has_no_more_does_not_come_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    checkpoint(tmp_path, "cpu").pull()
    hub.repositories.clear()

    with pytest.raises(ModelLoadFailed, match="there is none"):
        checkpoint(tmp_path, "cpu").download()
