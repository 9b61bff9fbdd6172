from __future__ import annotations

import importlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from demo import whisper_tiny_en
from dev_server import ROOT
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.setup import build_engine
from feature_extraction_server.flask.app import create_app
from tests.checkpoints import checkpoint
from tests.plugins.asking import Ask
from tests.plugins.hearing import RATE, encode, in_base64, noise

plugin: Any = importlib.import_module("feature_extraction_server.models.faster_whisper")

TASK = "automated_speech_recognition"
SENTENCES = ROOT / "tests" / "speech"


@pytest.fixture
def ask(asks: Callable[[str], Ask]) -> Ask:
    return asks("faster_whisper")


@pytest.fixture(scope="module")
def direct() -> Callable[..., tuple[list[Any], Any]]:
    """``direct(samples, **arguments)`` gives the segments and the information that the library alone gives."""
    library: Any = importlib.import_module("faster_whisper")
    model = library.WhisperModel(str(checkpoint("faster_whisper")), device="cpu", compute_type="int8", cpu_threads=1)

    def transcribe(samples: Any, **arguments: Any) -> tuple[list[Any], Any]:
        plain = {"beam_size": 1, "temperature": 0, "condition_on_previous_text": False}
        segments, info = model.transcribe(samples, **plain | arguments)
        return list(segments), info

    return transcribe


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ({}, {}),
        ({"language": "EN"}, {"language": "en"}),
        ({"max_new_tokens": 5}, {"max_new_tokens": 5}),
        ({"num_beams": 3}, {"beam_size": 3}),
        (
            {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
            {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        ),
    ],
    ids=str,
)
def test_text_is_the_one_that_the_library_gives(
    ask: Ask, direct: Callable[..., tuple[list[Any], Any]], config: dict[str, Any], arguments: dict[str, Any]
) -> None:
    limit = {"max_new_tokens": 20}
    segments, info = direct(noise(1), **limit | arguments)

    answer = ask(TASK, audio=encode(noise(1)), config=limit | config | {"timestamps": "segments"})

    assert answer["text"] == "".join(segment.text for segment in segments).strip()
    assert answer["text"]
    assert answer["language"] == info.language


def test_language_and_translation_are_asked_of_a_multilingual_checkpoint(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(TASK, audio=encode(noise(1)), config={"max_new_tokens": 1})
    asked: list[dict[str, Any]] = []

    def transcribe(samples: Any, **arguments: Any) -> tuple[list[Any], Any]:
        asked.append(arguments)
        return [], SimpleNamespace(language="fr")

    multilingual = SimpleNamespace(is_multilingual=True)
    library = SimpleNamespace(transcribe=transcribe, supported_languages=["en", "fr"], model=multilingual)
    monkeypatch.setattr(plugin, "model", library)

    ask(TASK, audio=encode(noise(1)), config={"language": "FR", "task": "translate"})

    assert (asked[0]["language"], asked[0]["task"]) == ("fr", "translate")


@pytest.fixture
def refused(refuses: Callable[..., str]) -> Callable[..., str]:
    return partial(refuses, "faster_whisper", TASK, {"audio": encode(noise(0))})


@pytest.mark.parametrize("file", ["model.bin", "config.json", "tokenizer.json"])
def test_checkpoint_without_one_of_its_files_is_a_503(refused: Callable[..., str], tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(checkpoint("faster_whisper"), tmp_path / "checkpoint"))
    (folder / file).unlink()

    error = refused(FASTER_WHISPER_CHECKPOINT=str(folder))

    assert f"FASTER_WHISPER_CHECKPOINT={folder} is incomplete or broken" in error


def test_checkpoint_with_half_its_weights_is_a_503(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("faster_whisper"), tmp_path / "checkpoint"))
    os.truncate(folder / "model.bin", (folder / "model.bin").stat().st_size // 2)

    assert "is incomplete or broken" in refused(FASTER_WHISPER_CHECKPOINT=str(folder))


@pytest.mark.parametrize("setting", ["DEVICE=cuda:99", "DEVICE=mps", "DTYPE=bfloat16"])
def test_device_or_precision_that_is_not_there_is_a_503(refused: Callable[..., str], setting: str) -> None:
    name, _, value = setting.partition("=")

    assert setting in refused(**{name: value})


@pytest.mark.parametrize(("dtype", "computed"), [("auto", "int8_float32"), ("float32", "float32")])
def test_precision_is_the_one_that_dtype_names(
    build: Callable[..., Engine], tiny_settings: dict[str, str], dtype: str, computed: str
) -> None:
    ask = Ask(create_app(build(**tiny_settings | {"DTYPE": dtype})).test_client(), "faster_whisper")

    ask(TASK, audio=encode(noise(0)), config={"max_new_tokens": 1, "language": "en"})

    assert plugin.provenance() == {
        "checkpoint": str(checkpoint("faster_whisper")),
        "revision": "local",
        "dtype": computed,
        "device": "cpu",
    }


# A GPU with CUDA, and the library that it needs


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The libraries that were loaded, on a machine with one GPU and none where the system looks for them."""
    libraries: list[str] = []

    def load(path: str) -> None:
        if not Path(path).is_absolute():
            raise OSError(f"{path}: cannot open shared object file")
        libraries.append(path)

    monkeypatch.setattr("ctranslate2.get_cuda_device_count", lambda: 1)
    monkeypatch.setattr(plugin, "ctypes", SimpleNamespace(CDLL=load))
    return libraries


def test_without_the_library_for_the_gpu_the_cpu_is_taken_and_the_log_says_why(
    build: Callable[..., Engine], tiny_settings: dict[str, str], loaded: list[str], tmp_path: Path
) -> None:
    ask = Ask(create_app(build(**tiny_settings | {"DEVICE": "auto"})).test_client(), "faster_whisper")

    ask(TASK, audio=encode(noise(0)), config={"max_new_tokens": 1, "language": "en"})

    assert plugin.provenance()["device"] == "cpu"
    (warning,) = (line for line in (tmp_path / "log.txt").read_text().splitlines() if "WARNING" in line)
    assert "libcublas.so.12: cannot open shared object file" in warning
    assert "pip install nvidia-cublas-cu12" in warning


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_gpu_that_is_named_is_a_503_without_its_library(
    refused: Callable[..., str], loaded: list[str], device: str
) -> None:
    error = refused(DEVICE=device)

    assert f"DEVICE={device}: CTranslate2 needs libcublas.so.12" in error
    assert "pip install nvidia-cublas-cu12" in error


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_library_for_the_gpu_is_loaded_from_its_package(
    refused: Callable[..., str], loaded: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str
) -> None:
    def load(*_: Any, device: str, **__: Any) -> None:
        raise RuntimeError(f"it is to run on {device}")

    files = [tmp_path / "nvidia" / "cublas" / "lib" / name for name in ("libcublas.so.12", "libcublasLt.so.12")]
    information = tmp_path / "nvidia_cublas_cu12-12.9.1.4.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-cublas-cu12\nVersion: 12.9.1.4\n")
    (information / "RECORD").write_text("".join(f"{file.relative_to(tmp_path)},,\n" for file in files))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("faster_whisper.WhisperModel", load)

    error = refused(DEVICE=device)

    assert "it is to run on cuda" in error
    assert loaded == [str(files[1]), str(files[0])]  # of these, the latter needs the former


# Trained weights


@pytest.fixture(scope="module")
def real_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("engine")
    weights = str(whisper_tiny_en.source_folder())
    settings = {"FASTER_WHISPER_CHECKPOINT": weights, "DEVICE": "cpu", "LOG_PATH": str(folder / "log.txt")}
    engine = build_engine(SettingsManager(settings, folder / ".env"))
    yield engine
    engine.close()


@pytest.fixture
def ask_real(real_engine: Engine) -> Ask:
    return Ask(create_app(real_engine).test_client(), "faster_whisper")


def words(text: str) -> list[str]:
    return re.sub(r"[^a-z0-9' ]", "", " ".join(text.lower().split())).split()


def n_errors(spoken: list[str], understood: list[str]) -> int:
    """Return how many words must be replaced, left out or added (Levenshtein's distance)."""
    distances = list(range(len(understood) + 1))
    for row, word in enumerate(spoken, 1):
        diagonal, distances[0] = distances[0], row
        for column, other in enumerate(understood, 1):
            best = min(distances[column] + 1, distances[column - 1] + 1, diagonal + (word != other))
            diagonal, distances[column] = distances[column], best
    return distances[-1]


@pytest.mark.weights
def test_at_most_four_words_in_a_hundred_are_misunderstood(ask_real: Ask) -> None:
    spoken = words((SENTENCES / "sentences.txt").read_text())

    answer = ask_real(TASK, audio=in_base64(SENTENCES / "sentences.ogg"))

    assert n_errors(spoken, words(answer)) / len(spoken) <= 0.04


@pytest.mark.weights
def test_voice_activity_filter_keeps_the_words_and_their_times(ask_real: Ask) -> None:
    samples, rate = soundfile.read(whisper_tiny_en.SPEECH_FILE, dtype="float32")
    quiet = np.concatenate([np.zeros(5 * rate, np.float32), samples[: round(8.5 * rate)]])
    config = {"vad_filter": True, "timestamps": "words"}

    answer = ask_real(TASK, audio=encode(quiet, rate), config=config)

    (_, _, first), (begin, end, second) = whisper_tiny_en.SPEECH_SENTENCES[:2]
    assert answer["text"] == f"{first} {second}"
    assert answer["language"] == "en"
    assert answer["words"][0]["start"] > 4.5
    spoken = answer["words"][-len(second.split()) :]
    assert all(begin + 4.5 < word["start"] < word["end"] < end + 5.5 for word in spoken)


@pytest.mark.weights
def test_voice_activity_filter_hears_nobody_in_noise(ask_real: Ask) -> None:
    hum = 0.02 * np.random.default_rng(0).normal(size=3 * RATE).astype(np.float32)

    assert ask_real(TASK, audio=encode(hum), config={"vad_filter": True}) == ""
