"""Detected objects: what the tasks answer, what a client may ask for, and what detectors have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

from PIL import Image
from pydantic import Field, create_model
from typing_extensions import TypedDict

from feature_extraction_server.core.checkpoints import Checkpoint
from feature_extraction_server.core.config import Config
from feature_extraction_server.core.strips import widen_strip
from feature_extraction_server.core.task import FiniteFloat, Probability

if TYPE_CHECKING:
    import torch

Box = Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)]
ClassNames = Annotated[list[str], Field(min_length=1, max_length=1024)]

#: The 80 classes of the COCO data set (https://cocodataset.org), in its order.
_COCO: Final = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
COCO_CLASSES: Final = _COCO.split(",")

#: What goes through a model at once, after resizing: four pictures of the size that detectors are mostly trained on. A
#: single one takes some hundreds of MB meanwhile.
PIXELS_A_CALL: Final = 4 * 800 * 1333
#: What a longer strip is shortened to for detectors that keep a picture's form, in pixels.
STRIP_LENGTH: Final = 1333


class Detections(TypedDict):
    """``boxes``: [xmin, ymin, xmax, ymax] in pixels of the image; the lists have one element an object."""

    boxes: list[Box]
    labels: list[str]
    scores: list[Probability]


def equally_long(detections: dict[str, list[Any]], inputs: dict[str, Any]) -> dict[str, list[Any]]:
    """Check that every object has a box, a label and a score."""
    if len({len(values) for values in detections.values()}) != 1:
        raise ValueError("boxes, labels and scores are not equally many")
    return detections


class DetectionConfig(Config):
    """What a client may ask of a detector. A model that is sure of less, or of more, has another ``threshold``."""

    threshold: float = Field(0.1, ge=0, le=1)
    nms_threshold: float = Field(1, ge=0, le=1)
    max_detections: int | None = Field(None, ge=1)


class Found(NamedTuple):
    """What a model finds in each image of a batch, still without a threshold and in no order.

    ``boxes``: float (n_images, n_boxes, 4), (centre x, centre y, width, height) relative to the image's size;
    ``scores``: float (n_images, n_boxes); ``labels``: int (n_images, n_boxes), indices into the classes.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    labels: torch.Tensor


def select(found: Found, names: list[str], images: list[Image.Image], wanted: DetectionConfig) -> list[Detections]:
    """Return each image's detections as the client wants them, best first, with boxes in pixels inside the image."""
    import torch

    centres, extents = found.boxes.float().cpu().chunk(2, dim=-1)
    sizes = torch.tensor([image.size * 2 for image in images])
    boxes = torch.cat([centres - extents / 2, centres + extents / 2], dim=-1).clamp(0, 1) * sizes[:, None]
    each = zip(boxes, found.scores.float().cpu(), found.labels.cpu(), strict=True)
    return [_select_of_one(*one, names, wanted) for one in each]


def _select_of_one(
    boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, names: list[str], wanted: DetectionConfig
) -> Detections:
    best = scores.argsort(descending=True, stable=True)
    chosen = best[scores[best] > wanted.threshold]
    if wanted.nms_threshold < 1:
        chosen = _suppress(chosen, boxes, labels, wanted.nms_threshold)
    chosen = chosen[: wanted.max_detections]
    chosen_names = [names[label] for label in labels[chosen].tolist()]
    return Detections(boxes=boxes[chosen].tolist(), labels=chosen_names, scores=scores[chosen].tolist())


def _suppress(best: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, threshold: float) -> torch.Tensor:
    """Drop what overlaps a better box of its own class by more than ``threshold`` (intersection over union)."""
    kept = []
    while len(best):
        first, rest = best[0], best[1:]
        kept.append(first)
        inner = (boxes[rest, 2:].minimum(boxes[first, 2:]) - boxes[rest, :2].maximum(boxes[first, :2])).clamp(min=0)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        intersection = inner.prod(dim=1)
        overlap = intersection / (area[rest] + area[first] - intersection).clamp(min=1e-9)
        best = rest[(overlap <= threshold) | (labels[rest] != labels[first])]
    return best.new_tensor([int(index) for index in kept])


def detect(
    checkpoint: Checkpoint,
    image_processor: Any,
    images: list[Image.Image],
    find: Callable[[torch.Tensor], Found],
    names: list[str],
    wanted: DetectionConfig,
) -> list[Detections]:
    """Return each image's detections by a model that sees images in their own form, as ``select`` does.

    Images that it sees in one size go through it together, ``PIXELS_A_CALL`` at most. Smaller images are not padded to
    the size of larger ones: convolutions see the padding, and would find other things than in the image alone.

    Args:
        checkpoint: the model's.
        image_processor: the model's, which resizes an image.
        images: those of the request.
        find: gives what the model finds in pixels (n_images, 3, height, width).
        names: the classes' names.
        wanted: the request's config.
    """
    import torch

    groups: dict[torch.Size, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
    for number, image in enumerate(images):
        picture, (width, height) = widen_strip(image, STRIP_LENGTH)
        pixels = checkpoint.pixel_values(image_processor, [picture])
        stretch = torch.tensor([picture.width / width, picture.height / height] * 2)
        groups.setdefault(pixels.shape, []).append((number, pixels, stretch))
    answers: dict[int, Detections] = {}
    for shape, group in groups.items():
        n_at_once = max(1, PIXELS_A_CALL // (shape[-2] * shape[-1]))
        for start in range(0, len(group), n_at_once):
            numbers, pixels_of_each, stretches = zip(*group[start : start + n_at_once], strict=True)
            with torch.inference_mode():
                found = find(torch.cat(pixels_of_each))
                boxes = found.boxes.float().cpu() * torch.stack(stretches)[:, None]
            selected = select(found._replace(boxes=boxes), names, [images[number] for number in numbers], wanted)
            answers |= zip(numbers, selected, strict=True)
    return [answers[number] for number in range(len(images))]


def with_classes(config_type: type[DetectionConfig]) -> type[DetectionConfig]:
    """Return what a client may ask for ``object_detection``, which takes no classes, of a detector of any classes.

    Args:
        config_type: what it may ask for ``zero_shot_object_detection``.
    """
    name, classes = f"{config_type.__name__}WithClasses", (ClassNames, COCO_CLASSES)
    return create_model(name, __base__=config_type, __doc__=config_type.__doc__, classes=classes)


def of_coco(
    detect_classes: Callable[[list[Image.Image], list[str], dict[str, Any]], list[Detections]],
) -> Callable[[list[Image.Image], dict[str, Any]], list[Detections]]:
    """Return ``object_detection`` by a detector of any classes: it looks for ``config.classes``, or those of COCO.

    Args:
        detect_classes: the model's ``zero_shot_object_detection``.
    """

    def object_detection(image: list[Image.Image], config: dict[str, Any]) -> list[Detections]:
        others = dict(config)
        return detect_classes(image, others.pop("classes", COCO_CLASSES), others)

    return object_detection
