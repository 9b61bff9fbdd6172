"""Tiny checkpoints of the models' architectures with random weights, laid out as the real ones are on the hub.

``checkpoint("blip")`` returns the folder, built on first use (a second or two each, all under 5 MB) and kept in
``.cache/checkpoints``. ``python -m tests.checkpoints`` builds them all.

The weights are random but the same every time, and large enough that different inputs give different answers, and that
the best token is well ahead of the next.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may come from anywhere else

LAYOUT_VERSION = 10  # raise it when a change here must reach the folders that are built already
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "checkpoints"

SIDE = 64  # of the pictures that the models see, in pixels
WIDTH = 32  # of hidden states
LAYERS = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXTS = (
    "a photo of a cat on a couch",
    "a picture of two dogs in the snow",
    "the red square and the blue circle",
    "Question: what is in the picture? Answer: a person with a bicycle",
    "one two three four five six seven eight nine ten, and so on.",
)
N_TIMESTAMPS = 1501  # from <|0.00|> to <|30.00|>
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def checkpoint(name: str) -> Path:
    """Return the folder of a model's checkpoint, by the model plugin's name."""
    folder = CACHE / f"v{LAYOUT_VERSION}-transformers-{version('transformers')}" / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be at it
            if not folder.is_dir():
                _build(name, folder)
    return folder


def _build(name: str, folder: Path) -> None:
    """Build aside and rename, so that an interruption leaves no half a checkpoint."""
    import torch

    aside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        with torch.random.fork_rng():
            torch.manual_seed(20)
            BUILDERS[name](aside)
        aside.chmod(0o755)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def transformers() -> Any:
    """Return the library, untyped: its annotations are narrower than what it takes."""
    return importlib.import_module("transformers")


def _write(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(content, indent=2))


def _enlarge(model: Any, factor: float) -> Any:
    """Multiply the weight matrices, so that the inputs decide about the outputs."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(factor)
    return model.eval()


def _prefer_words(embeddings: Any) -> None:
    """Make a decoder with tied embeddings write words rather than the single bytes, with which vocabularies begin."""
    embeddings[:256] *= 0.1


def _byte_pairs(special: list[str], word_end: str = "") -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a byte-level vocabulary that ends with the special tokens, and its merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=word_end))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split]) if word_end else split
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, end_of_word_suffix=word_end, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    merges = [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + word_end for letter in alphabet), *("".join(pair) for pair in merges), *special]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges


def _word_pieces() -> dict[str, int]:
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = sorted({word for text in TEXTS for word in text.lower().split()})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *letters, *("##" + letter for letter in letters), *words]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def _blip(folder: Path) -> None:

    vocabulary = _word_pieces()
    # As in the real checkpoint, the tokens that begin a caption are beyond the tokenizer's vocabulary.
    text = {
        "vocab_size": len(vocabulary) + 2,
        "max_position_embeddings": 64,
        "projection_dim": WIDTH,
        "encoder_hidden_size": WIDTH,
        "bos_token_id": len(vocabulary),
        "eos_token_id": 2,
        "sep_token_id": vocabulary["[SEP]"],
        "pad_token_id": vocabulary["[PAD]"],
    }
    vision = LAYERS | {"image_size": SIDE, "patch_size": 16, "projection_dim": WIDTH, "initializer_range": 0.02}
    config = transformers().BlipConfig(text_config=LAYERS | text, vision_config=vision, projection_dim=WIDTH)
    _enlarge(transformers().BlipForConditionalGeneration(config), 6).save_pretrained(folder)
    transformers().BertTokenizer(vocab=vocabulary, model_max_length=512).save_pretrained(folder)
    _write(
        folder,
        "preprocessor_config.json",
        {
            "do_normalize": True,
            "do_resize": True,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "image_processor_type": "BlipImageProcessor",
            "processor_class": "BlipProcessor",
            "size": {"height": SIDE, "width": SIDE},
        },
    )


def _blip2(folder: Path) -> None:
    from torch import nn

    n_image_tokens = 4
    end, pad = "</s>", "<pad>"
    vocabulary, merges = _byte_pairs(["<s>", pad, end])
    tokenizer = transformers().GPT2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        add_bos_token=True,
        model_max_length=1000000000000000019884624838656,
        bos_token=end,
        eos_token=end,
        unk_token=end,
        pad_token=pad,
    )
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    config = transformers().Blip2Config(
        vision_config=LAYERS | {"image_size": SIDE, "patch_size": 16, "initializer_range": 0.02},
        qformer_config=LAYERS
        | {"vocab_size": 8, "max_position_embeddings": 8, "encoder_hidden_size": WIDTH, "cross_attention_frequency": 1},
        text_config={
            "model_type": "opt",
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "word_embed_proj_dim": WIDTH,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 96,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": vocabulary[end],
            "pad_token_id": tokenizer.pad_token_id,
        },
        num_query_tokens=n_image_tokens,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model: Any = transformers().Blip2ForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens, std=0.5)  # they start as zeros, and would all stay the same
    _enlarge(model, 6)
    _prefer_words(model.get_input_embeddings().weight.data)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write(folder, "processor_config.json", {"num_query_tokens": n_image_tokens, "processor_class": "Blip2Processor"})
    _write(
        folder,
        "preprocessor_config.json",
        {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "image_processor_type": "BlipImageProcessor",
            "processor_class": "Blip2Processor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": SIDE, "width": SIDE},
        },
    )


def _vit_gpt2(folder: Path) -> None:
    import torch

    end = "<|endoftext|>"
    vocabulary, merges = _byte_pairs([end])
    number = vocabulary[end]
    encoder = transformers().ViTConfig(**LAYERS, image_size=SIDE, patch_size=16)
    decoder = transformers().GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=64,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        bos_token_id=number,
        eos_token_id=number,
    )
    config = transformers().VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model: Any = transformers().VisionEncoderDecoderModel(config=config)
    for settings in (model.config, model.generation_config):
        settings.decoder_start_token_id = number
        settings.bos_token_id = number
        settings.eos_token_id = number
        settings.pad_token_id = number
    _enlarge(model, 6)
    _prefer_words(model.decoder.get_input_embeddings().weight.data)
    model.save_pretrained(folder)
    # The real checkpoint's weights are a pickle, and its tokenizer has no padding token.
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    transformers().GPT2Tokenizer(vocab=vocabulary, merges=merges, model_max_length=1024).save_pretrained(folder)
    _write(
        folder,
        "preprocessor_config.json",
        {
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "ViTFeatureExtractor",
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": 2,
            "size": SIDE,
        },
    )


def _clip_tokenizer(length: int, padding: str = "<|endoftext|>") -> Any:

    vocabulary, merges = _byte_pairs(["<|startoftext|>", "<|endoftext|>"], word_end="</w>")
    return transformers().CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length, pad_token=padding)


def _clip_text_config(tokenizer: Any) -> dict[str, Any]:
    return LAYERS | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "projection_dim": WIDTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _clip_vit_large_patch14(folder: Path, activation: str = "quick_gelu") -> None:

    tokenizer = _clip_tokenizer(77)
    vision = LAYERS | {"image_size": SIDE, "patch_size": 16, "projection_dim": WIDTH}
    config = transformers().CLIPConfig(
        text_config=_clip_text_config(tokenizer) | {"hidden_act": activation},
        vision_config=vision | {"hidden_act": activation},
        projection_dim=WIDTH,
    )
    _enlarge(transformers().CLIPModel(config), 4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write(
        folder,
        "preprocessor_config.json",
        {
            "crop_size": SIDE,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "resample": 3,
            "size": SIDE,
        },
    )


def _owlvit_base_patch32(folder: Path) -> None:
    from torch import nn

    tokenizer = _clip_tokenizer(16, padding="!")
    config = transformers().OwlViTConfig(
        text_config=_clip_text_config(tokenizer),
        vision_config=LAYERS | {"image_size": SIDE, "patch_size": 8},
        projection_dim=WIDTH,
    )
    model: Any = transformers().OwlViTForObjectDetection(config)
    _enlarge(model, 2)
    heads = [*model.class_head.modules(), *model.box_head.modules()]
    for layer in (module for module in heads if isinstance(module, nn.Linear)):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)  # else every score and coordinate is 0 or 1
        nn.init.zeros_(layer.bias)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write(
        folder,
        "preprocessor_config.json",
        {
            "crop_size": SIDE,
            "do_center_crop": False,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "OwlViTFeatureExtractor",
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "resample": 3,
            "size": [SIDE, SIDE],
        },
    )


def _whisper(folder: Path) -> None:
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    languages = list(LANGUAGES)[:99]
    special = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in languages)]
    special += ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>"]
    special += ["<|notimestamps|>"]
    vocabulary, merges = _byte_pairs(special[:1])
    tokenizer = transformers().WhisperTokenizer(
        vocab=vocabulary, merges=merges, additional_special_tokens=special[1:], pad_token=special[0]
    )
    tokenizer.add_tokens([f"<|{number * 0.02:.2f}|>" for number in range(N_TIMESTAMPS)])
    token = tokenizer.convert_tokens_to_ids
    end, start = token("<|endoftext|>"), token("<|startoftranscript|>")
    config = transformers().WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=80,
        d_model=WIDTH,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=1500,
        max_target_positions=448,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
        begin_suppress_tokens=[token("Ġ"), end],
        init_std=0.3,
    )
    model: Any = transformers().WhisperForConditionalGeneration(config).eval()
    embeddings = model.model.decoder.embed_tokens.weight.data
    embeddings[-N_TIMESTAMPS:] *= 0.1  # else most of what it writes would be timestamps
    _prefer_words(embeddings)
    generation = {
        "_from_model_config": False,  # else it is made anew from the config when it is loaded
        "alignment_heads": [[1, 0], [1, 2]],
        "begin_suppress_tokens": [token("Ġ"), end],
        "decoder_start_token_id": start,
        "is_multilingual": True,
        "lang_to_id": {f"<|{code}|>": token(f"<|{code}|>") for code in languages},
        "max_initial_timestamp_index": 50,
        "max_length": 64,  # it does not end by itself
        "no_timestamps_token_id": token("<|notimestamps|>"),
        "prev_sot_token_id": token("<|startofprev|>"),
        "return_timestamps": False,
        "suppress_tokens": [token(name) for name in special[1:] if name != "<|notimestamps|>"],
        "task_to_id": {"transcribe": token("<|transcribe|>"), "translate": token("<|translate|>")},
    }
    for key, value in generation.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(folder)
    transformers().WhisperProcessor(transformers().WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)
    transformers().WhisperFeatureExtractor().save_pretrained(folder)  # the real checkpoint has it in a file of its own


def _all_minilm_l6_v2(folder: Path) -> None:
    vocabulary = _word_pieces()
    config = transformers().BertConfig(**LAYERS, vocab_size=len(vocabulary), max_position_embeddings=512)
    _enlarge(transformers().BertModel(config), 4).save_pretrained(folder)
    transformers().BertTokenizer(vocab=vocabulary, model_max_length=512).save_pretrained(folder)


def _open_clip_vit_b32(folder: Path) -> None:
    _clip_vit_large_patch14(folder, "gelu")


def _siglip2_base_patch16_224(folder: Path) -> None:
    import torch

    # As in the real checkpoint, the tokenizer is one that keeps capitals, and gives no mask.
    tokenizer = transformers().GemmaTokenizer(
        vocab=(vocabulary := _pieces(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])),
        merges=[("\u2581", "a")],
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
        model_input_names=["input_ids"],
        model_max_length=64,
    )
    ends = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    config = transformers().SiglipConfig(
        text_config=LAYERS | ends | {"vocab_size": len(vocabulary), "projection_size": WIDTH},
        vision_config=LAYERS | {"image_size": SIDE, "patch_size": 16},
    )
    model: Any = _enlarge(transformers().SiglipModel(config), 2)
    with torch.no_grad():
        model.logit_scale.fill_(2.3)
        model.logit_bias.fill_(-1.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write(
        folder,
        "preprocessor_config.json",
        {
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "image_processor_type": "SiglipImageProcessor",
            "processor_class": "SiglipProcessor",
            "resample": 2,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": SIDE, "width": SIDE},
        },
    )


def _dino_v2_vits14(folder: Path) -> None:
    # As in the real checkpoint, the position embeddings are for larger pictures than the image processor makes.
    layers = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers().Dinov2Config(**layers, image_size=SIDE + 34, patch_size=14)
    _enlarge(transformers().Dinov2Model(config), 4).save_pretrained(folder)
    _write(
        folder,
        "preprocessor_config.json",
        {
            "crop_size": {"height": 56, "width": 56},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "image_processor_type": "BitImageProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"shortest_edge": SIDE},
        },
    )


def _pieces(special: list[str]) -> dict[str, int]:
    """Return a vocabulary of single letters and bytes, as SentencePiece makes them."""
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *map(chr, range(33, 127)), "\u2581a"]
    return {token: number for number, token in enumerate(tokens)}


def _multilingual_e5_base(folder: Path) -> None:
    words = sorted({word for text in TEXTS for word in text.split()} | {"query:", "passage:"})
    scored = [(letter, -9.0) for letter in ["\u2581", *map(chr, range(33, 127))]]
    scored += [("\u2581" + word, -1.0 - number / 100) for number, word in enumerate(words)]
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = transformers().XLMRobertaTokenizer(
        vocab=[*((token, 0.0) for token in special), *scored, ("<mask>", 0.0)], model_max_length=512
    )
    config = transformers().XLMRobertaConfig(
        **LAYERS, vocab_size=len(tokenizer), max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
    )
    _enlarge(transformers().XLMRobertaModel(config), 4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _e5mistral7b_instruct(folder: Path) -> None:
    vocabulary = _pieces(["<unk>", "<s>", "</s>"])
    tokenizer = transformers().LlamaTokenizer(
        vocab=vocabulary,
        merges=[("\u2581", "a")],
        add_bos_token=True,
        add_eos_token=True,
        pad_token="</s>",  # noqa: S106 - no password
        model_max_length=4096,
    )
    config = transformers().MistralConfig(
        **LAYERS, num_key_value_heads=2, vocab_size=len(vocabulary), max_position_embeddings=8192, sliding_window=4096
    )
    _enlarge(transformers().MistralModel(config), 6).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _vit_base_patch16_224(folder: Path) -> None:
    names = {0: "tabby, tabby cat", 1: "Egyptian cat", 2: "sports car", 3: "teapot", 4: "daisy", 5: "hen", 6: "crib"}
    config = transformers().ViTConfig(**LAYERS, image_size=SIDE, patch_size=16, id2label=names)
    _enlarge(transformers().ViTForImageClassification(config), 4).save_pretrained(folder)
    _write(
        folder,
        "preprocessor_config.json",
        {
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "ViTImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "resample": 2,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": SIDE, "width": SIDE},
        },
    )


def _write_detector_processor(folder: Path, name: str) -> None:
    _write(
        folder,
        "preprocessor_config.json",
        {
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": f"{name}FeatureExtractor",
            "format": "coco_detection",
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "max_size": 192,
            "size": 96,
        },
    )


def _spread(model: Any, layers: list[Any]) -> Any:
    """Start the last layers of a detector anew, so that its boxes and scores differ from each other."""
    from torch import nn

    for layer in layers:
        nn.init.normal_(layer.weight, std=2 * layer.in_features**-0.5)
        nn.init.zeros_(layer.bias)
    return model.eval()


def _detr_resnet101(folder: Path) -> None:
    names = {0: "N/A", 1: "person", 2: "bicycle", 3: "car", 4: "cat"}
    backbone = transformers().ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])
    config = transformers().DetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone,
        d_model=WIDTH,
        num_queries=12,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        id2label=names,
    )
    model: Any = transformers().DetrForObjectDetection(config)
    _enlarge(model.model, 3)
    _spread(model, [model.class_labels_classifier, *model.bbox_predictor.layers]).save_pretrained(folder)
    _write_detector_processor(folder, "Detr")


def _grounding_dino_tiny(folder: Path) -> None:
    vocabulary = _words_of_bert()
    config = transformers().GroundingDinoConfig(
        backbone_config=transformers().SwinConfig(
            image_size=SIDE,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 2, 2, 2],
            window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=transformers().BertConfig(**LAYERS, vocab_size=len(vocabulary), max_position_embeddings=64),
        d_model=WIDTH,
        num_queries=12,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_text_len=24,
    )
    model: Any = transformers().GroundingDinoForObjectDetection(config)
    model.model.decoder.layer_norm.weight.data *= 0.2  # else every score is 0 or 1
    _spread(model, model.bbox_embed[0].layers).save_pretrained(folder)
    transformers().BertTokenizer(vocab=vocabulary, model_max_length=512).save_pretrained(folder)
    _write_detector_processor(folder, "GroundingDino")


def _words_of_bert() -> dict[str, int]:
    """Return word pieces with the numbers that Grounding DINO takes for granted: BERT's for what ends a name."""
    vocabulary = _word_pieces()
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    others = iter([token for token in vocabulary if token not in special.values()])
    n_tokens = 1030
    return {special.get(number) or next(others, f"[unused{number}]"): number for number in range(n_tokens)}


def _faster_whisper(folder: Path) -> None:
    """Convert the checkpoint of whisper. Its vocabulary is so small that CTranslate2 takes it to be an English one."""
    converters: Any = importlib.import_module("ctranslate2.converters")
    converter = converters.TransformersConverter(str(checkpoint("whisper")), copy_files=["tokenizer.json"])
    converter.convert(str(folder), force=True)


def _sherpa_onnx(folder: Path) -> None:
    """Write the trained network: one with random weights would hear nobody."""
    from demo import speaker_weights

    speaker_weights.write_segmentation(folder)


def _sherpa_onnx_embedding(folder: Path) -> None:
    from demo import speaker_weights

    speaker_weights.write_embedding(folder)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "blip": _blip,
    "blip2": _blip2,
    "vit_gpt2": _vit_gpt2,
    "clip_vit_large_patch14": _clip_vit_large_patch14,
    "owlvit_base_patch32": _owlvit_base_patch32,
    "vit_base_patch16_224": _vit_base_patch16_224,
    "detr_resnet101": _detr_resnet101,
    "grounding_dino_tiny": _grounding_dino_tiny,
    "whisper": _whisper,
    "faster_whisper": _faster_whisper,
    "sherpa_onnx": _sherpa_onnx,
    "sherpa_onnx_embedding": _sherpa_onnx_embedding,
    "all_minilm_l6_v2": _all_minilm_l6_v2,
    "open_clip_vit_b32": _open_clip_vit_b32,
    "siglip2_base_patch16_224": _siglip2_base_patch16_224,
    "dino_v2_vits14": _dino_v2_vits14,
    "multilingual_e5_base": _multilingual_e5_base,
    "e5mistral7b_instruct": _e5mistral7b_instruct,
}


if __name__ == "__main__":
    for name in BUILDERS:
        sys.stdout.write(f"{checkpoint(name)}\n")
