"""Checkpoints on a hub: pulled ahead of time, or downloaded by the start of a model, which tells how far it is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.plugins import discover
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.subprocesses import KINDS
from tests.checkpoints import BUILDERS, checkpoint
from tests.conftest import PLUGIN_PATH, Server, server_environment
from tests.hub import Hub, commit, copy_with, running_hub
from tests.waiting import wait_until

pytestmark = pytest.mark.process

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
NOT_NEEDED = ("pytorch_model.bin", "flax_model.msgpack", "tf_model.h5", "model.gguf", "onnx/model.onnx", "README.md")
LOAD_EACH = """
import sys
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.setup import build_engine

engine = build_engine(SettingsManager())
for model in sys.argv[1:]:
    engine.start(model, wait=True)
    engine.stop(model)
engine.close()
"""

# What it loads is no model of transformers.
HUB_MODEL = """
from feature_extraction_server.core.checkpoints import Checkpoint

def add_settings(settings_manager):
    global checkpoint
    checkpoint = Checkpoint(settings_manager, "hub_model", "owner/name", files=("config.json", "*.bin"))

def load_model():
    global weights
    with checkpoint.loading() as folder:
        weights = (folder / "model.bin").read_bytes()

def provenance():
    return {"revision": checkpoint.revision}

def text_embedding(text, config):
    return [[float(len(weights))] for _ in text]
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub_settings(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """Settings of a process that has the hub, and a cache of its own."""
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "DEVICE": "cpu"}


@pytest.fixture
def run_python(tmp_path: Path, hub_settings: dict[str, str]) -> Run:
    """``run_python(arguments, ..., SETTING=value)`` runs Python with the hub, and returns what has come of it."""

    def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        environment = server_environment(tmp_path, **hub_settings | {"OMP_NUM_THREADS": "1"} | settings)
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture
def pull(run_python: Run) -> Run:
    return lambda *models, **settings: run_python("-m", "feature_extraction_server.core.pull", *models, **settings)


@pytest.fixture(scope="module")
def default_names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """The names on the hub and the revisions of the models' default checkpoints, of those that tests can build."""
    registry = discover(SettingsManager({}, tmp_path_factory.mktemp("settings") / ".env"), KINDS)
    found = {name: vars(module).get("checkpoint") for name, module in registry.models.items() if name in BUILDERS}
    return {name: (value.name, value.revision) for name, value in found.items() if isinstance(value, Checkpoint)}


def cached(folder: Path, name: str) -> set[str]:
    """Return the files that a cache has of a repository, with the commit's folder."""
    snapshots = folder / "cache" / "hub" / f"models--{name.replace('/', '--')}" / "snapshots"
    return {str(path.relative_to(snapshots)) for path in snapshots.rglob("*") if path.is_file()}


def hub_model_files(tmp_path: Path) -> Path:
    """Make a repository of ``hub_model``, of 102 bytes."""
    (folder := tmp_path / "repository").mkdir()
    (folder / "config.json").write_bytes(b"{}")
    (folder / "model.bin").write_bytes(bytes(100))
    return folder


def test_pulled_model_answers_without_the_hub_and_tells_its_commit(
    pull: Run, gunicorn: Callable[..., Server], hub_settings: dict[str, str]
) -> None:
    with running_hub() as hub:
        hub.add(MINILM, checkpoint("all_minilm_l6_v2"))
        pulled = pull("all_minilm_l6_v2", HF_ENDPOINT=hub.url)
    server = gunicorn(**hub_settings | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"})

    response = server.post("/api/models/all_minilm_l6_v2/tasks/text_embedding/features?meta=1", {"text": "a cat"})

    assert pulled.returncode == 0, pulled.stderr
    assert response.status_code == 200, response.json()
    assert len(response.json()["result"]) == 32
    told = {"checkpoint": MINILM, "revision": commit(MINILM, "main"), "dtype": "float32", "device": "cpu"}
    assert response.json()["meta"].items() >= told.items()


def test_pulled_files_are_all_that_each_model_needs(
    hub: Hub, pull: Run, run_python: Run, default_names: dict[str, tuple[str, str]]
) -> None:
    # The files of sherpa_onnx come from two repositories; the hub here has one a model.
    models = [model for model in default_names if model != "sherpa_onnx"]
    for model in models:
        name, revision = default_names[model]
        hub.add(name, checkpoint(model), revision)

    pulled = pull(*models)
    loaded = run_python("-c", LOAD_EACH, *models, HF_HUB_OFFLINE="1")

    assert pulled.returncode == 0, pulled.stderr
    assert loaded.returncode == 0, loaded.stderr


def test_pull_takes_one_form_of_the_weights_and_nothing_of_other_frameworks(
    hub: Hub, pull: Run, tmp_path: Path
) -> None:
    needed = {path.name for path in checkpoint("all_minilm_l6_v2").iterdir()}
    hub.add(MINILM, copy_with(checkpoint("all_minilm_l6_v2"), tmp_path / "repository", *NOT_NEEDED))

    pulled = pull("all_minilm_l6_v2")

    assert pulled.returncode == 0, pulled.stderr
    assert set(hub.downloaded) == needed


def test_pull_takes_the_revision_that_is_set(hub: Hub, pull: Run, tmp_path: Path) -> None:
    hub.add(MINILM, checkpoint("all_minilm_l6_v2"))
    hub.add(MINILM, checkpoint("all_minilm_l6_v2"), "v2")

    pulled = pull("all_minilm_l6_v2", ALL_MINILM_L6_V2_REVISION="v2")

    assert pulled.returncode == 0, pulled.stderr
    assert f"{MINILM}, commit {commit(MINILM, 'v2')}" in pulled.stdout
    assert {Path(file).parts[0] for file in cached(tmp_path, MINILM)} == {commit(MINILM, "v2")}


def test_answers_and_status_tell_which_commit_was_downloaded_by_a_process_of_its_own(
    hub: Hub,
    hub_settings: dict[str, str],
    gunicorn: Callable[..., Server],
    plugin: Callable[[str, str, str], None],
    tmp_path: Path,
) -> None:
    plugin("models", "hub_model", HUB_MODEL)
    path = os.pathsep.join([str(tmp_path / "plugins"), *PLUGIN_PATH])
    hub.add("owner/name", hub_model_files(tmp_path), "v2")
    settings = {"HUB_MODEL_REVISION": "v2", "HUB_MODEL_CONSUMER_TYPE": "process_consumer", "PYTHONPATH": path}
    server = gunicorn(**hub_settings | settings)

    answer = server.post("/api/models/hub_model/tasks/text_embedding/features?meta=1", {"text": "a cat"}).json()
    status = server.get("/api/models/hub_model/status").json()

    assert answer["meta"]["revision"] == commit("owner/name", "v2")
    assert status["provenance"]["revision"] == commit("owner/name", "v2")


def test_second_pull_downloads_nothing(hub: Hub, pull: Run) -> None:
    hub.add(MINILM, checkpoint("all_minilm_l6_v2"))
    pull("all_minilm_l6_v2")
    hub.downloaded.clear()

    pulled = pull("all_minilm_l6_v2")

    assert pulled.returncode == 0, pulled.stderr
    assert hub.downloaded == []


def test_model_that_cannot_be_had_fails_and_the_others_are_pulled(hub: Hub, pull: Run, tmp_path: Path) -> None:
    hub.add(MINILM, checkpoint("all_minilm_l6_v2"))

    pulled = pull("blip", "all_minilm_l6_v2")

    assert pulled.returncode == 1
    assert pulled.stderr.startswith("blip: the checkpoint BLIP_CHECKPOINT=Salesforce/")
    assert "there is none" in pulled.stderr
    assert cached(tmp_path, MINILM)


def test_revision_that_is_not_there_is_told(hub: Hub, pull: Run) -> None:
    hub.add(MINILM, checkpoint("all_minilm_l6_v2"))

    pulled = pull("all_minilm_l6_v2", ALL_MINILM_L6_V2_REVISION="v9")

    assert pulled.returncode == 1
    assert "at ALL_MINILM_L6_V2_REVISION=v9 could not be had" in pulled.stderr
    assert "it has no such revision" in pulled.stderr


def test_pull_of_what_is_cached_fails_without_a_hub_since_nobody_can_tell_whether_it_is_whole(
    hub: Hub, pull: Run
) -> None:
    hub.add(MINILM, checkpoint("all_minilm_l6_v2"))
    pull("all_minilm_l6_v2")

    pulled = pull("all_minilm_l6_v2", HF_HUB_OFFLINE="1")

    assert pulled.returncode == 1
    assert "could not be had" in pulled.stderr


def test_model_without_a_checkpoint_and_one_with_a_folder_have_nothing_to_download(pull: Run) -> None:
    pulled = pull("fake_echo", "blip", BLIP_CHECKPOINT=str(checkpoint("blip")))

    assert pulled.returncode == 0, pulled.stderr
    assert pulled.stdout.startswith("fake_echo: nothing to download\nblip: nothing to download: ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [([], "name the models, or give --all"), (["no_model"], "there is no model no_model")],
    ids=["none", "unknown"],
)
def test_pull_that_names_no_model_there_is_says_so(pull: Run, arguments: list[str], sentence: str) -> None:
    pulled = pull(*arguments)

    assert pulled.returncode == 2
    assert sentence in pulled.stderr


@pytest.mark.parametrize("consumer_type", ["single_thread_consumer", "process_consumer"])
def test_status_tells_how_far_a_download_has_come(
    hub: Hub,
    hub_settings: dict[str, str],
    gunicorn: Callable[..., Server],
    plugin: Callable[[str, str, str], None],
    tmp_path: Path,
    consumer_type: str,
) -> None:
    plugin("models", "hub_model", HUB_MODEL)
    path = os.pathsep.join([str(tmp_path / "plugins"), *PLUGIN_PATH])
    hub.add("owner/name", hub_model_files(tmp_path))
    hub.hold(".bin")
    server = gunicorn(**hub_settings, HUB_MODEL_CONSUMER_TYPE=consumer_type, PYTHONPATH=path)

    def status() -> dict[str, Any]:
        told: dict[str, Any] = server.get("/api/models/hub_model/status").json()
        return told

    server.post("/api/models/hub_model/start", {})
    assert hub.half_way.wait(60)
    wait_until(lambda: bool(status()["progress"]["bytes_done"]))
    stalled = status()
    hub.release()
    wait_until(lambda: status()["state"] != "loading")

    assert stalled["state"] == "loading"
    assert stalled["progress"]["stage"] == "downloading"
    assert stalled["progress"]["bytes_total"] == 102
    assert 2 <= stalled["progress"]["bytes_done"] < 102
    assert (status()["state"], status()["progress"]) == ("running", None)
