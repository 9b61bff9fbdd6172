"""Train the small demonstration checkpoints on synthetic pictures.

Run for example ``python -m demo.train_checkpoints blip owlvit_base_patch32`` from the repository's root. Each
checkpoint takes a few minutes on one processor core. Everything is built from scratch: vocabularies, configurations
and weights; nothing is downloaded. The accuracy printed at the end is measured on pictures that were not trained on,
with the checkpoint loaded again from its folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    GPT2Config,
    GPT2Tokenizer,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessorPil,
    OwlViTProcessor,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from demo.shapes import COLOURS, GROUNDS, SHAPES, TEST_SEED, Truth, draw_shape, draw_shapes

logger = logging.getLogger(__name__)

SIDE = 72  # of the pictures the captioning models see
PATCH = 12
CLASSIFIER_SIDE = 64
CLASSIFIER_PATCH = 8
DETECTOR_SIDE = 96
DETECTOR_PATCH = 12
WIDTH = 96  # of the transformers' hidden states
IMAGE_TOKENS = 8  # what BLIP-2's language model sees of a picture
BATCH = 64
TEST_PICTURES = 400
PICTURE_SIZES = ((224, 224), (160, 160), (240, 180), (180, 240), (256, 160), (200, 300), (128, 128), (320, 240))
TEMPLATES = ("{}", "a {}", "the {}", "a photo of a {}", "a picture of a {}", "an image of a {}", "this is a {}")
SYNONYMS = ("photo", "photograph", "photography", "image", "drawing", "painting", "color", "gray", "cat", "dog")
# What a caption may be asked to begin with, and how it goes on.
PROMPTS = (
    ("a picture of", "{caption}"),
    ("a photo of", "{caption}"),
    ("an image of", "{caption}"),
    ("a drawing of", "{caption}"),
    ("a photography of", "{caption}"),
    ("this is", "{caption}"),
    ("there is", "{caption}"),
    ("it is", "{caption}"),
    ("i see", "{caption}"),
    ("the picture shows", "{caption}"),
    ("the ground is", "{ground}"),
    ("the background is", "{ground}"),
    ("the shape is", "a {shape}"),
    ("the colour is", "{colour}"),
    ("the color is", "{colour}"),
    ("the {shape} is", "{colour}"),
    ("the {colour} shape is", "a {shape}"),
    ("the", "shape is a {shape}"),
)
# What BLIP-2 may be asked as "Question: ... Answer:".
QUESTIONS = (
    ("what colour is the shape?", "{colour}"),
    ("what color is the shape?", "{colour}"),
    ("what shape is it?", "{shape}"),
    ("what shape is in the picture?", "{shape}"),
    ("what colour is the ground?", "{ground}"),
    ("what color is the background?", "{ground}"),
    ("what is in the picture?", "{caption}"),
)


@dataclass(frozen=True)
class Run:
    """How a checkpoint is to be trained: where it is, for how long, on which pictures, from where on."""

    folder: Path
    steps: int
    pictures: int
    resume: bool = False

    @property
    def seeds(self) -> range:
        """Return the training pictures' seeds: others than before when training goes on."""
        first = self.pictures if self.resume else 0
        return range(first, first + self.pictures)

    @property
    def rate(self) -> float:
        """Return the highest learning rate."""
        return 3e-4 if self.resume else 1e-3


# --------------------------------------------------------------------------------------------------------------------
# Pictures


@dataclass(frozen=True)
class Pool:
    """Pictures as the model sees them (not yet normalised), and what is on them."""

    pixels: Tensor
    truths: list[tuple[Truth, ...]]
    sizes: list[tuple[int, int]]  # width and height of the original pictures
    mean: Tensor
    std: Tensor

    def batch(self, indices: Tensor, mirror: bool = True) -> Tensor:
        """Return the chosen pictures' pixel values as the image processor would have made them.

        With ``mirror`` half of the batches are mirrored left to right, which changes no shape.
        """
        pixels = (self.pixels[indices].float() / 255 - self.mean) / self.std
        return pixels.flip(-1) if mirror and torch.rand(()) < 0.5 else pixels


def picture(seed: int, several: bool = False) -> tuple[Image.Image, tuple[Truth, ...]]:
    """Draw the picture with the given seed in one of several sizes."""
    size = PICTURE_SIZES[seed % len(PICTURE_SIZES)]
    if several and seed % 3:
        return draw_shapes(seed, size)
    image, truth = draw_shape(seed, size)
    return image, (truth,)


def training_pool(image_processor: Any, seeds: range, several: bool = False) -> Pool:
    """Draw the training pictures and resize them as the image processor does."""
    pixels, truths, sizes = [], [], []
    for seed in seeds:
        image, truth = picture(seed, several)
        values = image_processor(image, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values
        pixels.append(values.to(torch.uint8))
        truths.append(truth)
        sizes.append(image.size)
    mean, std = torch.tensor([image_processor.image_mean, image_processor.image_std]).view(2, 1, 3, 1, 1)
    return Pool(torch.cat(pixels), truths, sizes, mean, std)


def held_out_pictures(several: bool = False, count: int = TEST_PICTURES) -> list[tuple[Image.Image, tuple[Truth, ...]]]:
    """Draw the pictures that nothing is trained on."""
    return [picture(seed, several) for seed in range(TEST_SEED, TEST_SEED + count)]


# --------------------------------------------------------------------------------------------------------------------
# Texts


def known_texts() -> list[str]:
    """Return texts that hold every word the models are trained on."""
    truths = [Truth(s, c, g, (0, 0, 1, 1)) for s in SHAPES for c in COLOURS for g in GROUNDS]
    prompts = [say(f"{start} {end}", truth) for start, end in PROMPTS for truth in truths]
    queries = [template.format(truth.label) for template in TEMPLATES for truth in truths]
    questions = [f"Question: {question} Answer:" for question, _ in QUESTIONS]
    return prompts + queries + questions + [truth.caption for truth in truths] + ["shape object", " ".join(SYNONYMS)]


def say(template: str, truth: Truth) -> str:
    """Fill in a text about a picture."""
    return template.format(caption=truth.caption, shape=truth.shape, colour=truth.colour, ground=truth.ground)


def byte_pair_encoding(special: Sequence[str], word_end: str = "") -> tuple[dict[str, int], list[Any]]:
    """Return a byte-level vocabulary and its merges: complete for all bytes, one token for every known word.

    The special tokens get the highest numbers, as in the well-known vocabularies.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=word_end))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        if word_end
        else [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, end_of_word_suffix=word_end, show_progress=False
    )
    tokenizer.train_from_iterator(known_texts(), trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + word_end for letter in alphabet), *("".join(pair) for pair in merges), *special]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return vocabulary, merges


def word_pieces() -> dict[str, int]:
    """Return a WordPiece vocabulary: all known words, and all printable ASCII characters to spell others."""
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = sorted({word for text in known_texts() for word in text.split()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *("##" + c for c in characters), *words]
    return {token: number for number, token in enumerate(dict.fromkeys([*tokens, "[DEC]", "[ENC]"]))}


def nonsense(rng: random.Random) -> str:
    """Return a word that names nothing in the pictures."""
    if rng.random() < 0.3:
        return rng.choice(SYNONYMS[-2:])
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 8)))


# --------------------------------------------------------------------------------------------------------------------
# Training and storing


def fit(model: nn.Module, pool: Pool, run: Run, loss_of: Callable[[Tensor], Tensor]) -> None:
    """Train a model; ``loss_of`` is given the numbers of the pictures of a batch."""
    torch.manual_seed(0)
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=run.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, run.rate, total_steps=run.steps, pct_start=0.1)
    for step in range(run.steps):
        loss = loss_of(torch.randint(len(pool.truths), (BATCH,)))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            logger.info("%s: step %d of %d, loss %.4f", type(model).__name__, step + 1, run.steps, loss.item())
    model.eval()


def store(folder: Path, model: Any, *processors: Any) -> None:
    """Write a checkpoint: weights as float16 (the configuration says float32, which they are loaded as)."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)
    config = folder / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**settings, "dtype": "float32"}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weights = folder / "model.safetensors"
    halves = {name: value.half().contiguous() for name, value in load_file(weights).items()}
    save_file(halves, weights, metadata={"format": "pt"})
    weights.chmod(0o644)


def caption_accuracy(captions: Sequence[str], expected: Sequence[str]) -> float:
    """Return the share of captions that are exactly as expected."""
    return sum(a.strip() == b for a, b in zip(captions, expected, strict=True)) / len(expected)


# --------------------------------------------------------------------------------------------------------------------
# BLIP


def build_blip() -> tuple[Any, Any]:
    """Return an untrained BLIP model and its processor."""
    vocabulary = word_pieces()
    tokenizer = BertTokenizer(
        vocab=vocabulary,
        bos_token="[DEC]",  # noqa: S106
        additional_special_tokens=["[ENC]"],
        model_max_length=48,
    )
    layers = {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 2 * WIDTH}
    config = BlipConfig(
        text_config={
            **layers,
            "num_hidden_layers": 2,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 64,
            "projection_dim": WIDTH,
            "bos_token_id": vocabulary["[DEC]"],
            "eos_token_id": vocabulary["[SEP]"],
            "sep_token_id": vocabulary["[SEP]"],
            "pad_token_id": vocabulary["[PAD]"],
        },
        vision_config={
            **layers,
            "num_hidden_layers": 3,
            "image_size": SIDE,
            "patch_size": PATCH,
            "projection_dim": WIDTH,
            "initializer_range": 0.02,
        },
        projection_dim=WIDTH,
        image_text_hidden_size=WIDTH,
    )
    image_processor = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor = BlipProcessor(image_processor, tokenizer)
    return BlipForConditionalGeneration(config), processor


def load_blip(folder: Path) -> tuple[Any, Any]:
    """Return the trained model and its processor."""
    return BlipForConditionalGeneration.from_pretrained(folder), BlipProcessor.from_pretrained(folder)


def blip_text(truth: Truth, rng: random.Random) -> tuple[str, str]:
    """Return a prompt and how the text goes on from there; half of the time there is no prompt."""
    kind = rng.random()
    if kind < 0.5:
        return "", truth.caption
    words = truth.caption.split()
    if kind < 0.65:  # the caption's own beginning, not always true
        words[1] = rng.choice(COLOURS)
        known = rng.randint(1, len(words) - 1)
        return " ".join(words[:known]), " ".join(words[known:])
    if kind < 0.72:
        return " ".join(nonsense(rng) for _ in range(rng.randint(1, 3))), truth.caption
    start, end = (say(part, truth) for part in rng.choice(PROMPTS))
    if end == truth.caption and rng.random() < 0.3:
        return f"{start} a", truth.caption[2:]
    return start, end


def train_blip(run: Run) -> None:
    """Train the captioning model that can be given the beginning of the caption."""
    model, processor = load_blip(run.folder) if run.resume else build_blip()
    pool = training_pool(processor.image_processor, run.seeds)
    tokenizer, text = processor.tokenizer, model.config.text_config
    rng = random.Random(0)

    def loss_of(indices: Tensor) -> Tensor:
        texts = [blip_text(pool.truths[index][0], rng) for index in indices.tolist()]
        tokens = tokenizer([f"{start} {end}".strip() for start, end in texts], padding=True, return_tensors="pt")
        tokens.input_ids[:, 0] = text.bos_token_id
        labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
        for row, (start, _) in enumerate(texts):
            labels[row, : 1 + len(tokenizer.tokenize(start))] = -100
        loss: Tensor = model(
            pixel_values=pool.batch(indices),
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            labels=labels,
        ).loss
        return loss

    fit(model, pool, run, loss_of)
    store(run.folder, model, processor)


def measure_blip(folder: Path) -> dict[str, float]:
    """Return the share of right captions, without and with different beginnings."""
    model, processor = load_blip(folder)
    pictures = held_out_pictures()
    images, truths = [image for image, _ in pictures], [truth for _, (truth,) in pictures]
    accuracies = {}
    cases = {
        "": "{caption}",
        "a": "{caption}",
        "a picture of": "a picture of {caption}",
        "a photo of a": "a photo of {caption}",
        "the ground is": "the ground is {ground}",
        "the shape is": "the shape is a {shape}",
        "the colour is": "the colour is {colour}",
    }
    for prompt, expected in cases.items():
        texts = {"text": [prompt] * len(images)} if prompt else {}
        output = model.generate(**processor(images=images, return_tensors="pt", **texts), max_new_tokens=20)
        captions = processor.batch_decode(output, skip_special_tokens=True)
        accuracies[prompt or "no prompt"] = caption_accuracy(captions, [say(expected, truth) for truth in truths])
    return accuracies


# --------------------------------------------------------------------------------------------------------------------
# ViT with GPT-2


def build_vit_gpt2() -> tuple[Any, Any, Any]:
    """Return an untrained ViT encoder with a GPT-2 decoder, its image processor and its tokenizer."""
    end = "<|endoftext|>"
    vocabulary, merges = byte_pair_encoding([end])
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=merges, pad_token=end, model_max_length=64)
    encoder = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        image_size=SIDE,
        patch_size=PATCH,
    )
    decoder = GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=64,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        n_inner=2 * WIDTH,
        bos_token_id=vocabulary[end],
        eos_token_id=vocabulary[end],
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.tie_word_embeddings = False
    model: Any = VisionEncoderDecoderModel(config=config)
    for settings in (model.config, model.generation_config):
        settings.decoder_start_token_id = vocabulary[end]
        settings.bos_token_id = vocabulary[end]
        settings.eos_token_id = vocabulary[end]
        settings.pad_token_id = vocabulary[end]
    return model, ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}), tokenizer


def load_vit_gpt2(folder: Path) -> tuple[Any, Any, Any]:
    """Return the trained model, its image processor and its tokenizer."""
    model: Any = VisionEncoderDecoderModel.from_pretrained(folder)
    return model, ViTImageProcessorPil.from_pretrained(folder), GPT2Tokenizer.from_pretrained(folder)


def train_vit_gpt2(run: Run) -> None:
    """Train the captioning model that takes nothing but a picture."""
    model, image_processor, tokenizer = load_vit_gpt2(run.folder) if run.resume else build_vit_gpt2()
    pool = training_pool(image_processor, run.seeds)

    def loss_of(indices: Tensor) -> Tensor:
        captions = [pool.truths[index][0].caption + tokenizer.eos_token for index in indices.tolist()]
        tokens = tokenizer(captions, padding=True, return_tensors="pt")
        labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
        loss: Tensor = model(pixel_values=pool.batch(indices), labels=labels).loss
        return loss

    fit(model, pool, run, loss_of)
    store(run.folder, model, image_processor, tokenizer)


def measure_vit_gpt2(folder: Path) -> dict[str, float]:
    """Return the share of right captions."""
    model, image_processor, tokenizer = load_vit_gpt2(folder)
    pictures = held_out_pictures()
    pixels = image_processor([image for image, _ in pictures], return_tensors="pt").pixel_values
    captions = tokenizer.batch_decode(model.generate(pixel_values=pixels, max_new_tokens=20), skip_special_tokens=True)
    return {"captions": caption_accuracy(captions, [truth.caption for _, (truth,) in pictures])}


# --------------------------------------------------------------------------------------------------------------------
# CLIP


def clip_tokenizer(length: int, **settings: Any) -> CLIPTokenizer:
    """Return a tokenizer as CLIP's; the end of the text has the highest number of all tokens."""
    vocabulary, merges = byte_pair_encoding(["<|startoftext|>", "<|endoftext|>"], word_end="</w>")
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length, **settings)


def build_clip() -> tuple[Any, Any]:
    """Return an untrained CLIP model and its processor."""
    tokenizer = clip_tokenizer(32)
    layers = {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 2 * WIDTH, "projection_dim": 64}
    config = CLIPConfig(
        text_config={
            **layers,
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 32,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**layers, "num_hidden_layers": 3, "image_size": CLASSIFIER_SIDE, "patch_size": CLASSIFIER_PATCH},
        projection_dim=64,
    )
    # The whole picture is resized, where CLIP would cut off what is outside the middle square.
    square = {"height": CLASSIFIER_SIDE, "width": CLASSIFIER_SIDE}
    image_processor = CLIPImageProcessorPil(size=square, crop_size=square)
    processor = CLIPProcessor(image_processor, tokenizer)
    return CLIPModel(config), processor


def load_clip(folder: Path) -> tuple[Any, Any]:
    """Return the trained model and its processor."""
    return CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)


@dataclass(frozen=True)
class Query:
    """A text that is right for some pictures, and what must be on those."""

    text: str
    shape: str | None = None
    colour: str | None = None
    ground: str | None = None

    def holds(self, truth: Truth) -> bool:
        """Tell whether the text is right."""
        wanted = ((self.shape, truth.shape), (self.colour, truth.colour), (self.ground, truth.ground))
        return all(value in (None, real) for value, real in wanted)


def shape_queries() -> list[Query]:
    """Return texts that name shapes and colours."""
    queries = [Query(shape, shape) for shape in SHAPES]
    for colour in COLOURS:
        queries += [Query(colour, colour=colour), Query(f"{colour} shape", colour=colour)]
        queries += [Query(f"{colour} {shape}", shape, colour) for shape in SHAPES]
    return queries


def ground_queries() -> list[Query]:
    """Return texts that name the ground as well."""
    queries = []
    for ground in GROUNDS:
        queries.append(Query(f"shape on {ground}", ground=ground))
        queries += [Query(f"{c} {s} on {ground}", s, c, ground) for c in COLOURS for s in SHAPES]
    return queries


def train_clip(run: Run) -> None:
    """Train the classifying model: each true text of a picture against all texts that are not true."""
    model, processor = load_clip(run.folder) if run.resume else build_clip()
    pool = training_pool(processor.image_processor, run.seeds)
    queries = shape_queries() + ground_queries()
    right = torch.tensor([[query.holds(truth) for query in queries] for (truth,) in pool.truths])
    rng = random.Random(0)

    def loss_of(indices: Tensor) -> Tensor:
        texts = [query.text for query in queries] + [nonsense(rng) for _ in range(8)]
        texts = [rng.choice(TEMPLATES).format(text) for text in texts]
        tokens = processor.tokenizer(texts, padding=True, return_tensors="pt")
        logits = model(pixel_values=pool.batch(indices), **tokens).logits_per_image
        true = functional.pad(right[indices], (0, 8))
        wrong = logits.masked_fill(true, -torch.inf).logsumexp(dim=1, keepdim=True)
        return functional.softplus(wrong - logits)[true].mean()

    fit(model, pool, run, loss_of)
    store(run.folder, model, processor)


def measure_clip(folder: Path) -> dict[str, float]:
    """Return the share of pictures for which the right class comes first, and comes with more than 0.9."""
    model, processor = load_clip(folder)
    pictures = held_out_pictures()
    truths = [truth for _, (truth,) in pictures]
    labels = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    cases: dict[str, tuple[Sequence[str], Callable[[Truth], str]]] = {
        "shapes": (SHAPES, lambda truth: truth.shape),
        "colours": (COLOURS, lambda truth: truth.colour),
        "all twelve": ([f"a photo of a {label}" for label in labels], lambda truth: f"a photo of a {truth.label}"),
        "captions": (
            [f"a {label} on {ground}" for label in labels for ground in GROUNDS],
            lambda truth: truth.caption,
        ),
    }
    accuracies = {}
    for name, (texts, answer) in cases.items():
        inputs = processor(images=[image for image, _ in pictures], text=list(texts), padding=True, return_tensors="pt")
        with torch.inference_mode():
            scores, best = model(**inputs).logits_per_image.softmax(dim=1).max(dim=1)
        hits = torch.tensor([texts[number] == answer(truth) for number, truth in zip(best, truths, strict=True)])
        accuracies[name] = hits.float().mean().item()
        accuracies[f"{name}, above 0.9"] = (hits & (scores > 0.9)).float().mean().item()
    return accuracies


# --------------------------------------------------------------------------------------------------------------------
# OWL-ViT


def build_owlvit() -> tuple[Any, Any]:
    """Return an untrained OWL-ViT model and its processor."""
    tokenizer = clip_tokenizer(16, pad_token="!")  # noqa: S106
    layers = {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 2 * WIDTH}
    config = OwlViTConfig(
        text_config={
            **layers,
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 16,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**layers, "num_hidden_layers": 4, "image_size": DETECTOR_SIDE, "patch_size": DETECTOR_PATCH},
        projection_dim=WIDTH,
    )
    model: Any = OwlViTForObjectDetection(config)
    start_owlvit_heads(model)
    square = {"height": DETECTOR_SIDE, "width": DETECTOR_SIDE}
    image_processor = OwlViTImageProcessorPil(size=square, crop_size=square)
    return model, OwlViTProcessor(image_processor, tokenizer)


def load_owlvit(folder: Path) -> tuple[Any, Any]:
    """Return the trained model and its processor."""
    return OwlViTForObjectDetection.from_pretrained(folder), OwlViTProcessor.from_pretrained(folder)


def start_owlvit_heads(model: Any) -> None:
    """Start the heads from small weights; those they are built with are far too large to learn from."""
    for head in (model.class_head, model.box_head):
        for layer in (module for module in head.modules() if isinstance(module, nn.Linear)):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
    for layer, bias in ((model.class_head.logit_scale, 10.0), (model.class_head.logit_shift, -0.7)):
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.constant_(layer.bias, bias)
    nn.init.normal_(model.box_head.dense2.weight, std=0.01)


@dataclass(frozen=True)
class Targets:
    """The shapes of all training pictures: boxes relative to the picture, and which queries each answers."""

    boxes: Tensor  # pictures x shapes x (centre x, centre y, width, height)
    present: Tensor  # pictures x shapes
    right: Tensor  # pictures x shapes x queries

    @classmethod
    def of(cls, pool: Pool, queries: Sequence[Query]) -> Targets:
        """Collect the shapes of a pool of pictures."""
        most = max(len(truths) for truths in pool.truths)
        boxes = torch.full((len(pool.truths), most, 4), 0.5)
        present = torch.zeros(len(pool.truths), most, dtype=torch.bool)
        right = torch.zeros(len(pool.truths), most, len(queries))
        for row, (truths, (width, height)) in enumerate(zip(pool.truths, pool.sizes, strict=True)):
            for column, truth in enumerate(truths):
                left, top, end, bottom = truth.box
                centre = [(left + end) / 2 / width, (top + bottom) / 2 / height]
                boxes[row, column] = torch.tensor([*centre, (end - left) / width, (bottom - top) / height])
                present[row, column] = True
                right[row, column] = torch.tensor([float(query.holds(truth)) for query in queries])
        return cls(boxes, present, right)


def corners(boxes: Tensor) -> Tensor:
    """Turn (centre x, centre y, width, height) into (xmin, ymin, xmax, ymax)."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], dim=-1)


def overlap(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return intersection over union, and its generalised form, of boxes given by their corners."""
    inner = (torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])).clamp(0)
    outer = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    intersection, hull = inner.prod(-1), outer.prod(-1)
    union = (first[..., 2:] - first[..., :2]).prod(-1) + (second[..., 2:] - second[..., :2]).prod(-1) - intersection
    ratio = intersection / union
    return ratio, ratio - (hull - union) / hull


def assign_patches(logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
    """Choose for each shape the one patch near its centre that fits best so far: pictures x shapes."""
    grid = DETECTOR_SIDE // DETECTOR_PATCH
    places = torch.arange(grid * grid)
    middles = (torch.stack([places % grid, places // grid], dim=-1) + 0.5) / grid
    distance = (targets.boxes[:, :, None, :2] - middles).abs().amax(-1)  # pictures x shapes x patches
    ratio, _ = overlap(corners(boxes)[:, None], corners(targets.boxes)[:, :, None])
    certainty = torch.einsum("bpq,bsq->bsp", logits.sigmoid(), targets.right) / targets.right.sum(-1, keepdim=True)
    fitness = (ratio + certainty).masked_fill(distance > 1.0 / grid, -1.0) - distance
    chosen: list[Tensor] = []
    for shape in range(fitness.shape[1]):
        free = fitness[:, shape].clone()
        for taken in chosen:
            free.scatter_(1, taken[:, None], -10.0)
        chosen.append(free.argmax(dim=1))
    return torch.stack(chosen, dim=1)


def detection_loss(logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
    """Return the loss of one batch; queries beyond the targets' are those that nothing answers."""
    beyond = logits.shape[-1] - targets.right.shape[-1]
    with torch.no_grad():
        patches = assign_patches(logits[..., : logits.shape[-1] - beyond], boxes, targets)
    present = targets.present
    rows = torch.arange(len(logits))[:, None].expand_as(patches)
    wanted = torch.zeros_like(logits)
    wanted[rows[present], patches[present]] = functional.pad(targets.right, (0, beyond))[present]
    entropy = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    certainty = logits.sigmoid()
    focus = torch.where(wanted > 0, 1 - certainty, certainty).detach()
    found, truth = boxes[rows, patches][present], targets.boxes[present]
    _, generalised = overlap(corners(found), corners(truth))
    distance = (found - truth).abs().sum(-1)
    return (entropy * focus).sum() / wanted.sum() + (5 * distance + 2 * (1 - generalised)).mean()


def train_owlvit(run: Run) -> None:
    """Train the detecting model; one patch near the shape's centre answers for each shape."""
    model, processor = load_owlvit(run.folder) if run.resume else build_owlvit()
    pool = training_pool(processor.image_processor, run.seeds, several=True)
    queries = [Query("shape"), Query("object"), *shape_queries()]
    everything = Targets.of(pool, queries)
    rng = random.Random(0)

    def loss_of(indices: Tensor) -> Tensor:
        texts = [query.text for query in queries] + [nonsense(rng) for _ in range(8)]
        texts = [rng.choice(TEMPLATES).format(text) for text in texts] + [" "]
        tokens = processor.tokenizer(texts, padding="max_length", return_tensors="pt")
        text_embeds = model.owlvit.text_projection(model.owlvit.text_model(**tokens).pooler_output)
        feature_map, _ = model.image_embedder(pool.batch(indices, mirror=False))
        features = feature_map.flatten(1, 2)
        logits, _ = model.class_predictor(features, text_embeds.expand(len(indices), -1, -1))
        boxes = model.box_predictor(features, feature_map)
        chosen = Targets(everything.boxes[indices], everything.present[indices], everything.right[indices])
        return detection_loss(logits, boxes, chosen)

    fit(model, pool, run, loss_of)
    store(run.folder, model, processor)


def measure_owlvit(folder: Path) -> dict[str, float]:
    """Return how well the shapes of the test pictures are found."""
    model, processor = load_owlvit(folder)
    labels = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    accuracies = {}
    for name, texts in {"shapes": list(SHAPES), "all twelve": [f"a photo of a {label}" for label in labels]}.items():
        ratios: list[float] = []
        missed = spurious = low = 0
        for image, truths in held_out_pictures(several=True):
            inputs = processor(text=[texts], images=image, return_tensors="pt")
            with torch.inference_mode():
                outputs = model(**inputs)
            (found,) = processor.post_process_grounded_object_detection(
                outputs, threshold=0.1, target_sizes=[(image.height, image.width)], text_labels=[texts]
            )
            unseen = set(range(len(found["scores"])))
            for truth in truths:
                ratio, _ = overlap(found["boxes"], torch.tensor(truth.box).float())
                fits = [
                    number
                    for number in unseen
                    if found["text_labels"][number].endswith(truth.label if len(texts) > 3 else truth.shape)
                    and ratio[number] > 0.5
                ]
                best = max(fits, key=lambda number: float(found["scores"][number]), default=None)
                if best is None or found["scores"][best] <= 0.5:
                    missed += 1
                    continue
                unseen.remove(best)
                ratios.append(float(ratio[best]))
            low += len(unseen)
            spurious += sum(bool(found["scores"][number] > 0.5) for number in unseen)
        total = missed + len(ratios)
        accuracies[f"{name}: found above 0.5"] = len(ratios) / total
        accuracies[f"{name}: mean IoU"] = sum(ratios) / max(1, len(ratios))
        accuracies[f"{name}: wrong or double above 0.5 per shape"] = spurious / total
        accuracies[f"{name}: wrong or double above 0.1 per shape"] = low / total
    return accuracies


# --------------------------------------------------------------------------------------------------------------------
# BLIP-2


def build_blip2() -> tuple[Any, Any]:
    """Return an untrained BLIP-2 model and its processor."""
    vocabulary, merges = byte_pair_encoding(["<pad>", "</s>"])
    tokenizer = GPT2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token="</s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        unk_token="</s>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        add_bos_token=True,
        padding_side="left",
        model_max_length=64,
    )
    image_processor = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    # The processor adds the token <image> to the tokenizer.
    processor = Blip2Processor(image_processor, tokenizer, IMAGE_TOKENS)
    layers = {"hidden_size": WIDTH, "num_attention_heads": 4}
    dropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = Blip2Config(
        vision_config={
            **layers,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 3,
            "image_size": SIDE,
            "patch_size": PATCH,
            "initializer_range": 0.02,
        },
        qformer_config={
            **layers,
            **dropped,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 2,
            "cross_attention_frequency": 1,
            "vocab_size": 8,  # the Q-Former reads no text
            "max_position_embeddings": 8,
        },
        text_config={
            **layers,
            "model_type": "opt",
            "num_hidden_layers": 2,
            "ffn_dim": 2 * WIDTH,
            "word_embed_proj_dim": WIDTH,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 96,
            "dropout": 0.0,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        num_query_tokens=IMAGE_TOKENS,
        image_token_index=tokenizer.get_vocab()["<image>"],
        image_text_hidden_size=WIDTH,
    )
    model: Any = Blip2ForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens, std=0.5)  # they start as zeros, and would all stay the same
    return model, processor


def load_blip2(folder: Path) -> tuple[Any, Any]:
    """Return the trained model and its processor."""
    return Blip2ForConditionalGeneration.from_pretrained(folder), Blip2Processor.from_pretrained(folder)


def blip2_text(truth: Truth, rng: random.Random) -> tuple[str, str]:
    """Return a prompt and what is to follow it; the prompt is a question, the caption's beginning, or nothing."""
    kind = rng.random()
    if kind < 0.4:
        return "", truth.caption
    if kind < 0.8:
        question, answer = rng.choice(QUESTIONS)
        return f"Question: {question} Answer:", f" {say(answer, truth)}"
    if kind < 0.9:
        return rng.choice(("a photo of", "a picture of", "an image of", "this is")), f" {truth.caption}"
    words = truth.caption.split()
    known = rng.randint(1, len(words) - 1)
    return " ".join(words[:known]), " " + " ".join(words[known:])


def train_blip2(run: Run) -> None:
    """Train the captioning model that can be asked questions."""
    model, processor = load_blip2(run.folder) if run.resume else build_blip2()
    pool = training_pool(processor.image_processor, run.seeds)
    tokenizer, image_token = processor.tokenizer, model.config.image_token_id
    rng = random.Random(0)

    def loss_of(indices: Tensor) -> Tensor:
        texts = [blip2_text(pool.truths[index][0], rng) for index in indices.tolist()]
        whole = [start + end + tokenizer.eos_token for start, end in texts]
        tokens = tokenizer(whole, padding=True, padding_side="right", return_tensors="pt")
        labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
        for row, (start, _) in enumerate(texts):
            labels[row, : 1 + len(tokenizer.tokenize(start))] = -100
        ahead = (IMAGE_TOKENS, 0)
        loss: Tensor = model(
            pixel_values=pool.batch(indices),
            input_ids=functional.pad(tokens.input_ids, ahead, value=image_token),
            attention_mask=functional.pad(tokens.attention_mask, ahead, value=1),
            labels=functional.pad(labels, ahead, value=-100),
        ).loss
        return loss

    fit(model, pool, run, loss_of)
    store(run.folder, model, processor)


def measure_blip2(folder: Path) -> dict[str, float]:
    """Return the share of right captions and answers."""
    model, processor = load_blip2(folder)
    pictures = held_out_pictures()
    images, truths = [image for image, _ in pictures], [truth for _, (truth,) in pictures]
    cases = {"": "{caption}", "a photo of": "{caption}"}
    cases |= {f"Question: {question} Answer:": answer for question, answer in QUESTIONS}
    accuracies = {}
    for prompt, expected in cases.items():
        texts = {"text": [prompt] * len(images)} if prompt else {}
        output = model.generate(**processor(images=images, return_tensors="pt", **texts), max_new_tokens=20)
        answers = processor.batch_decode(output, skip_special_tokens=True)
        answers = [answer.removeprefix(prompt) for answer in answers]
        accuracies[prompt or "no prompt"] = caption_accuracy(answers, [say(expected, truth) for truth in truths])
    return accuracies


# --------------------------------------------------------------------------------------------------------------------


# --------------------------------------------------------------------------------------------------------------------
# ViT


def all_labels() -> list[str]:
    """Return the twelve names of a colour and a shape that a picture may show."""
    return [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def build_vit() -> tuple[Any, Any]:
    """Return an untrained ViT classifier and its image processor."""
    config = ViTConfig(
        hidden_size=WIDTH,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        image_size=CLASSIFIER_SIDE,
        patch_size=CLASSIFIER_PATCH,
        id2label=dict(enumerate(all_labels())),
    )
    square = {"height": CLASSIFIER_SIDE, "width": CLASSIFIER_SIDE}
    return ViTForImageClassification(config), ViTImageProcessorPil(size=square)


def load_vit(folder: Path) -> tuple[Any, Any]:
    """Return the trained model and its image processor."""
    return ViTForImageClassification.from_pretrained(folder), ViTImageProcessorPil.from_pretrained(folder)


def train_vit(run: Run) -> None:
    """Train the classifier that knows the twelve labels."""
    model, image_processor = load_vit(run.folder) if run.resume else build_vit()
    pool = training_pool(image_processor, run.seeds)
    right = torch.tensor([all_labels().index(truth.label) for (truth,) in pool.truths])

    def loss_of(indices: Tensor) -> Tensor:
        loss: Tensor = model(pixel_values=pool.batch(indices), labels=right[indices]).loss
        return loss

    fit(model, pool, run, loss_of)
    store(run.folder, model, image_processor)


def measure_vit(folder: Path) -> dict[str, float]:
    """Return how often the most probable class is the right one."""
    model, image_processor = load_vit(folder)
    certainties = []
    for image, (truth,) in held_out_pictures():
        with torch.inference_mode():
            logits = model(pixel_values=image_processor(image, return_tensors="pt").pixel_values).logits[0]
        best = int(logits.argmax())
        certainties.append(float(logits.softmax(-1)[best]) if all_labels()[best] == truth.label else 0.0)
    return {
        "right one of twelve": sum(certainty > 0 for certainty in certainties) / len(certainties),
        "right with more than 0.9": sum(certainty > 0.9 for certainty in certainties) / len(certainties),
    }


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is made: its functions, the number of training steps and of training pictures."""

    train: Callable[[Run], None]
    measure: Callable[[Path], dict[str, float]]
    steps: int
    pictures: int


RECIPES = {
    "blip": Recipe(train_blip, measure_blip, 1800, 24000),
    "blip2": Recipe(train_blip2, measure_blip2, 2000, 24000),
    "vit_gpt2": Recipe(train_vit_gpt2, measure_vit_gpt2, 2000, 24000),
    "clip_vit_large_patch14": Recipe(train_clip, measure_clip, 1500, 24000),
    "owlvit_base_patch32": Recipe(train_owlvit, measure_owlvit, 3000, 16000),
    "vit_base_patch16_224": Recipe(train_vit, measure_vit, 1500, 16000),
}


def main() -> None:
    """Train and measure the checkpoints named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="name", help=f"checkpoints: {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "checkpoints", help="output folder")
    parser.add_argument("--steps", type=int, help="number of training steps, for a quick trial")
    parser.add_argument("--pictures", type=int, help="number of training pictures")
    parser.add_argument("--resume", action="store_true", help="train the stored checkpoints further, on other pictures")
    parser.add_argument("--test-only", action="store_true", help="only measure the checkpoints there are")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(RECIPES)
    if unknown:
        parser.error(f"unknown checkpoints: {', '.join(sorted(unknown))}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    for name in arguments.names or RECIPES:
        recipe, folder = RECIPES[name], arguments.output / name
        start = time.monotonic()
        if not arguments.test_only:
            torch.manual_seed(0)
            steps, pictures = arguments.steps or recipe.steps, arguments.pictures or recipe.pictures
            recipe.train(Run(folder, steps, pictures, arguments.resume))
            print(f"{name}: trained in {time.monotonic() - start:.0f} s")  # noqa: T201
        for case, share in recipe.measure(folder).items():
            print(f"{name}: {case}: {share:.4f}")  # noqa: T201


if __name__ == "__main__":
    main()
