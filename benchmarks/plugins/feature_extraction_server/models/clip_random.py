"""A CLIP of the size of ViT-B/32 with random weights."""

from typing import Any

from PIL.Image import Image

from benchmarks.workloads import ZeroShot
from feature_extraction_server.core.class_vectors import ClassVectors
from feature_extraction_server.core.torch_threads import in_parallel, split

image_sizes = {"zero_shot_image_classification": 224}
model: ZeroShot
class_vectors: ClassVectors


def load_model() -> None:
    global model, class_vectors
    model = ZeroShot()
    class_vectors = ClassVectors(model.embed_classes)


def zero_shot_image_classification(image: list[Image], classes: list[str], config: dict[str, Any]) -> list[list[float]]:
    import torch

    images = torch.cat(in_parallel(model.embed, split(image)))
    probabilities: list[list[float]] = model.probabilities(images, class_vectors(classes))
    return probabilities
