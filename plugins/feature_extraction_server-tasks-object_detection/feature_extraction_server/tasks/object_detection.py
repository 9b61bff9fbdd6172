"""The task object detection: where in an image which objects are."""

from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from feature_extraction_server.core.task import ConfigField, FiniteFloat, ImageField, Probability, TaskSpec

Box = Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)]


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


task = TaskSpec(
    description="Identify regions of an image that contain objects.",
    inputs={
        "image": ImageField("The image in which objects need to be detected"),
        "config": ConfigField(),
    },
    output=Detections,
    example={"boxes": [[30, 50, 200, 300]], "labels": ["cat"], "scores": [0.95]},
    postprocess=equally_long,
)
wrap = task.wrap
