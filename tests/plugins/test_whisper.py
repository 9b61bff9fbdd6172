from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch

from demo import whisper_tiny_en
from dev_server import ROOT
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.setup import build_engine
from feature_extraction_server.flask.app import create_app
from tests.checkpoints import checkpoint
from tests.plugins.asking import Ask
from tests.plugins.hearing import RATE, encode, in_base64, noise

whisper: Any = importlib.import_module("feature_extraction_server.models.whisper")

TASK = "automated_speech_recognition"
LIMIT = {"max_new_tokens": 30}  # in tokens: the random checkpoint does not end by itself


@pytest.fixture
def ask(asks: Callable[[str], Ask]) -> Ask:
    return asks("whisper")


@pytest.fixture(scope="module")
def direct() -> Callable[..., str]:
    """``direct(samples, **arguments)`` gives what transformers alone writes for a recording of at most 30 s."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    model: Any = WhisperForConditionalGeneration.from_pretrained(checkpoint("whisper"))
    processor: Any = WhisperProcessor.from_pretrained(checkpoint("whisper"))

    def transcribe(samples: Any, **arguments: Any) -> str:
        features = processor(samples, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
        with torch.inference_mode():
            tokens = model.generate(**features, **{"task": "transcribe"} | arguments)
        text: str = processor.batch_decode(tokens, skip_special_tokens=True)[0]
        return text.strip()

    return transcribe


@pytest.mark.parametrize(("seed", "config"), [(0, {}), (1, LIMIT), (2, LIMIT)], ids=["whole", "second", "third"])
def test_text_is_the_one_that_transformers_gives(
    ask: Ask, direct: Callable[..., str], seed: int, config: dict[str, int]
) -> None:
    answer = ask(TASK, audio=encode(noise(seed)), config=config)

    assert answer == direct(noise(seed), **config)
    assert answer


@pytest.mark.parametrize(
    "config",
    [
        {"language": "de"},
        {"language": "German"},
        {"task": "translate"},
        {"language": "fr", "task": "translate", "num_beams": 3},
        {"max_new_tokens": 4},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_config_reaches_the_model(ask: Ask, direct: Callable[..., str], config: dict[str, Any]) -> None:
    config = LIMIT | config
    arguments = config | ({"language": config["language"].lower()} if "language" in config else {})

    answer = ask(TASK, audio=encode(noise(1)), config=config)

    assert answer == direct(noise(1), **arguments)


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_a_recording_of_another_sampling_rate_is_resampled(ask: Ask, direct: Callable[..., str], rate: int) -> None:
    samples = soxr.resample(noise(1), RATE, rate)

    answer = ask(TASK, audio=encode(np.stack([samples, samples], axis=1), rate), config=LIMIT)

    assert answer == direct(np.clip(soxr.resample(np.clip(samples, -1, 1), rate, RATE), -1, 1), **LIMIT)


def test_a_long_recording_goes_through_the_model_in_batches_of_a_fixed_size(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    features = whisper._features

    def record(windows: list[Any]) -> Any:
        sizes.append(len(windows))
        return features(windows)

    monkeypatch.setattr(whisper, "_features", record)

    ask(TASK, audio=encode(noise(0, 600)), config={"language": "en", "max_new_tokens": 2})

    assert sum(sizes) >= 20
    assert max(sizes) == whisper.WINDOWS_A_CALL


# Times


def is_in_order(timed: list[dict[str, Any]], duration: float) -> bool:
    times = [time for one in timed for time in (one["start"], one["end"])]
    return all(0 <= one["start"] <= one["end"] <= duration for one in timed) and times[::2] == sorted(times[::2])


@pytest.mark.parametrize("timestamps", ["segments", "words"])
def test_times_are_in_order_and_within_the_recording(ask: Ask, timestamps: str) -> None:
    config = {"timestamps": timestamps, "max_new_tokens": 40, "language": "fr"}

    answer = ask(TASK, audio=encode(noise(1, 70)), config=config)

    assert answer["duration"] == 70
    assert answer["language"] == "fr"
    assert answer["segments"]
    assert is_in_order(answer["segments"], 70)
    assert answer["segments"][-1]["end"] > 45
    assert list(answer) == ["text", "language", "segments", *(["words"] if timestamps == "words" else []), "duration"]


def test_words_are_those_of_the_text(ask: Ask) -> None:
    answer = ask(TASK, audio=encode(noise(1)), config={"timestamps": "words", "max_new_tokens": 40})

    assert is_in_order(answer["words"], 2)
    assert "".join(word["text"] for word in answer["words"]) == "".join(answer["text"].split())


@pytest.mark.parametrize("timestamps", ["segments", "words"])
def test_times_of_a_batch_are_those_of_its_recordings_alone(ask: Ask, timestamps: str) -> None:
    recordings = [encode(noise(seed, seconds)) for seed, seconds in enumerate((2, 0.05, 31, 0.2))]
    config = {"timestamps": timestamps, "max_new_tokens": 20}

    answers = ask(TASK, audio=recordings, config=config)

    assert answers == [ask(TASK, audio=recording, config=config) for recording in recordings]


@pytest.fixture
def writes(ask: Ask) -> Iterator[Callable[..., list[int]]]:
    """``writes(*texts)`` has the model write the first text for each window of its first pass, and so on.

    It gives the list into which the number of windows of each pass is written.
    """
    ask(TASK, audio=encode(noise(1)), config={"max_new_tokens": 1})  # loads the model
    tokenizer, end = whisper.processor.tokenizer, [whisper.processor.tokenizer.eos_token_id]
    hooks = []

    def write(*texts: str) -> list[int]:
        scripts = iter([tokenizer(text, add_special_tokens=False).input_ids for text in texts])
        left: list[int] = []
        n_windows: list[int] = []

        def listen(_module: Any, _inputs: Any, output: Any) -> None:
            n_windows.append(len(output.last_hidden_state))
            left[:] = next(scripts) + end

        def choose(_module: Any, _inputs: Any, logits: Any) -> None:
            logits[..., left.pop(0)] = 1e4

        hooks.append(whisper.model.get_encoder().register_forward_hook(listen))
        hooks.append(whisper.model.proj_out.register_forward_hook(choose))
        return n_windows

    yield write
    for hook in hooks:
        hook.remove()


TIMED = {"timestamps": "segments", "language": "en"}
BEGINS_ANOTHER = "<|0.00|> snow<|1.00|><|1.00|>"


def test_what_begins_where_a_recording_ends_is_not_asked_of_its_padding(
    ask: Ask, writes: Callable[..., list[int]]
) -> None:
    n_windows = writes(BEGINS_ANOTHER, "<|0.00|> made up<|2.00|>")

    answer = ask(TASK, audio=encode(noise(1, 1)), config=TIMED)

    assert n_windows == [1]
    assert answer["segments"] == [{"start": 0, "end": 1, "text": "snow"}]
    assert answer["text"] == "snow"


def test_what_is_said_to_begin_behind_the_end_is_made_up(ask: Ask, writes: Callable[..., list[int]]) -> None:
    writes("<|0.00|> snow<|1.00|><|1.00|> made up<|2.00|>")

    answer = ask(TASK, audio=encode(noise(1, 1)), config=TIMED)

    assert answer["segments"] == [{"start": 0, "end": 1, "text": "snow"}]
    assert answer["text"] == "snow"


def test_the_first_words_of_a_recording_may_be_told_late(ask: Ask, writes: Callable[..., list[int]]) -> None:
    writes("<|0.60|> snow<|1.00|><|1.00|> made up<|2.00|>")

    answer = ask(TASK, audio=encode(noise(1, 0.5)), config=TIMED)

    assert answer["segments"] == [{"start": 0.5, "end": 0.5, "text": "snow"}]


def test_the_rest_of_a_window_is_decoded_if_the_model_stopped_before_its_end(
    ask: Ask, writes: Callable[..., list[int]]
) -> None:
    n_windows = writes(BEGINS_ANOTHER, "<|0.20|> red<|1.10|><|1.40|> red<|2.10|>")

    short, long = ask(TASK, audio=[encode(noise(1, 1)), encode(noise(2, 3))], config=TIMED)

    assert n_windows == [2, 1]
    assert short["text"] == "snow"
    assert long["text"] == "snow red red"
    times = [time for segment in long["segments"] for time in (segment["start"], segment["end"])]
    assert times == pytest.approx([0, 1, 1.2, 2.1, 2.4, 3])


@pytest.mark.parametrize("end", [np.zeros(RATE, np.float32), noise(2, 0.09)], ids=["silent", "short"])
def test_a_rest_without_sound_is_not_decoded(ask: Ask, writes: Callable[..., list[int]], end: Any) -> None:
    n_windows = writes(BEGINS_ANOTHER, "<|0.00|> made up<|1.00|>")

    answer = ask(TASK, audio=encode(np.concatenate([noise(1, 1), end])), config=TIMED)

    assert n_windows == [1]
    assert answer["text"] == "snow"


def test_a_segment_that_the_limit_cuts_short_is_decoded_again(ask: Ask, writes: Callable[..., list[int]]) -> None:
    writes("<|0.00|> snow<|1.00|><|1.00|> red red red red", "<|0.00|> red<|1.00|>")

    answer = ask(TASK, audio=encode(noise(1, 2)), config=TIMED | {"max_new_tokens": 9})

    assert answer["text"] == "snow red"


def test_times_of_words_leave_the_faster_attention_in_place(ask: Ask) -> None:
    ask(TASK, audio=encode(noise(1)), config=LIMIT)
    attention = whisper.model.config._attn_implementation

    ask(TASK, audio=encode(noise(1)), config={"timestamps": "words", "max_new_tokens": 4})

    assert whisper.model.config._attn_implementation == attention == "sdpa"


@pytest.fixture
def ask_without(build: Callable[..., Engine], tmp_path: Path) -> Callable[[str], Ask]:
    """``ask_without(key)`` asks a checkpoint whose ``generation_config.json`` lacks that key."""

    def start(key: str) -> Ask:
        folder = Path(shutil.copytree(checkpoint("whisper"), tmp_path / "whisper"))
        file = folder / "generation_config.json"
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != key}))
        return Ask(create_app(build(WHISPER_CHECKPOINT=str(folder), DEVICE="cpu")).test_client(), "whisper")

    return start


def test_a_checkpoint_that_names_no_timestamps_writes_texts_without_them(ask_without: Callable[[str], Ask]) -> None:
    assert ask_without("no_timestamps_token_id")(TASK, audio=encode(noise(1)), config=LIMIT)


def test_a_checkpoint_without_alignment_heads_tells_the_times_of_segments_only(
    ask_without: Callable[[str], Ask],
) -> None:
    ask = ask_without("alignment_heads")
    config = {"max_new_tokens": 4}

    response = ask.response(TASK, audio=encode(noise(1)), config=config | {"timestamps": "words"})

    assert response.status_code == 400
    assert response.json["field"] == "config.timestamps"
    assert "segments only" in response.json["error"]
    assert ask(TASK, audio=encode(noise(1)), config=config | {"timestamps": "segments"})["segments"]


@pytest.fixture(scope="module")
def real_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine whose Whisper has the trained weights of tiny.en."""
    folder = tmp_path_factory.mktemp("engine")
    weights = whisper_tiny_en.build(ROOT / ".cache" / "checkpoints" / "whisper_tiny_en")
    settings = {"WHISPER_CHECKPOINT": str(weights), "DEVICE": "cpu", "LOG_PATH": str(folder / "log.txt")}
    engine = build_engine(SettingsManager(settings, folder / ".env"))
    yield engine
    engine.close()


@pytest.fixture
def ask_real(real_engine: Engine) -> Ask:
    return Ask(create_app(real_engine).test_client(), "whisper")


@pytest.mark.weights
def test_trained_weights_understand_speech(ask_real: Ask) -> None:
    speech = in_base64(Path(whisper_tiny_en.SPEECH_FILE))

    assert ask_real(TASK, audio=speech) == whisper_tiny_en.SPEECH_TEXT


@pytest.mark.weights
def test_trained_weights_write_every_word_of_ten_sentences_but_a_number(ask_real: Ask) -> None:
    folder = ROOT / "tests" / "speech"

    answer = ask_real(TASK, audio=in_base64(folder / "sentences.ogg"))

    assert answer == " ".join((folder / "sentences.txt").read_text().splitlines()).replace("twenty", "20")


@pytest.mark.weights
def test_trained_weights_understand_speech_of_more_than_a_minute(ask_real: Ask) -> None:
    samples, rate = soundfile.read(whisper_tiny_en.SPEECH_FILE, dtype="float32")
    long = np.concatenate([np.concatenate([samples, np.zeros(rate // 2, np.float32)])] * 4)

    answer = ask_real(TASK, audio=encode(long, rate))

    assert answer == " ".join([whisper_tiny_en.SPEECH_TEXT] * 4)


@pytest.mark.weights
@pytest.mark.parametrize(
    ("config", "field"),
    [({"language": "de"}, "config.language"), ({"task": "translate"}, "config.task")],
    ids=str,
)
def test_an_english_checkpoint_refuses_other_languages(ask_real: Ask, config: dict[str, Any], field: str) -> None:
    response = ask_real.response(TASK, audio=encode(noise(0)), config=config)

    assert response.status_code == 400
    assert response.json["field"] == field
    assert "English only" in response.json["error"]


@pytest.mark.weights
def test_an_english_checkpoint_takes_english(ask_real: Ask) -> None:
    speech = in_base64(Path(whisper_tiny_en.SPEECH_FILE))

    assert ask_real(TASK, audio=speech, config={"language": "English"}) == whisper_tiny_en.SPEECH_TEXT


@pytest.fixture(scope="module")
def library(real_engine: Engine) -> Any:
    """What transformers alone answers with the trained weights."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor, pipeline

    folder = ROOT / ".cache" / "checkpoints" / "whisper_tiny_en"
    processor: Any = WhisperProcessor.from_pretrained(folder)
    return pipeline(
        "automatic-speech-recognition",
        model=WhisperForConditionalGeneration.from_pretrained(folder),
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
    )


@pytest.mark.weights
def test_times_of_segments_are_those_that_transformers_gives(ask_real: Ask, library: Any) -> None:
    samples, rate = soundfile.read(whisper_tiny_en.SPEECH_FILE, dtype="float32")
    samples = samples[: round(8.5 * rate)]  # two sentences
    expected = library({"raw": samples, "sampling_rate": rate}, return_timestamps=True)["chunks"]

    segments = ask_real(TASK, audio=encode(samples, rate), config={"timestamps": "segments"})["segments"]

    assert [segment["text"] for segment in segments] == [chunk["text"].strip() for chunk in expected]
    assert [(segment["start"], segment["end"]) for segment in segments] == [chunk["timestamp"] for chunk in expected]


@pytest.mark.weights
def test_words_begin_about_where_transformers_says(ask_real: Ask, library: Any) -> None:
    samples, rate = soundfile.read(whisper_tiny_en.SPEECH_FILE, dtype="float32")
    samples = samples[: round(8.5 * rate)]  # two sentences
    expected = library({"raw": samples, "sampling_rate": rate}, return_timestamps="word")["chunks"]

    words = ask_real(TASK, audio=encode(samples, rate), config={"timestamps": "words"})["words"]

    assert [word["text"] for word in words] == [chunk["text"].strip() for chunk in expected]
    # Its words begin earlier after a silence.
    begins = [chunk["timestamp"][0] for chunk in expected]
    assert [word["start"] for word in words] == pytest.approx(begins, abs=0.4)


@pytest.mark.weights
def test_trained_weights_tell_when_each_word_of_a_long_recording_is_spoken(ask_real: Ask) -> None:
    samples, rate = soundfile.read(whisper_tiny_en.SPEECH_FILE, dtype="float32")
    once = np.concatenate([samples, np.zeros(rate // 2, np.float32)])

    answer = ask_real(TASK, audio=encode(np.concatenate([once] * 2), rate), config={"timestamps": "words"})

    assert answer["text"] == " ".join([whisper_tiny_en.SPEECH_TEXT] * 2)
    assert answer["language"] == "en"
    assert [segment["text"] for segment in answer["segments"]] == [
        text for _, _, text in whisper_tiny_en.SPEECH_SENTENCES
    ] * 2
    words = iter(answer["words"])
    for repetition in range(2):
        for begin, end, text in whisper_tiny_en.SPEECH_SENTENCES:
            offset = repetition * len(once) / rate
            spoken = [next(words) for _ in text.split()]
            assert " ".join(word["text"] for word in spoken) == text
            assert all(begin + offset - 0.5 < word["start"] < word["end"] < end + offset + 0.5 for word in spoken)
