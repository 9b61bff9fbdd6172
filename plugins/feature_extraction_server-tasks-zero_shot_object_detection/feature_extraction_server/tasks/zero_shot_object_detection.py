"""The task zero-shot object detection: where in an image objects of given classes are."""

from typing import Any

from feature_extraction_server.core.detections import Detections, equally_long
from feature_extraction_server.core.task import ConfigField, ImageField, StringListField, TaskSpec


def of_the_classes(detections: dict[str, list[Any]], inputs: dict[str, Any]) -> dict[str, list[Any]]:
    """Check that every object has a box, a score, and one of the classes."""
    strange = set(detections["labels"]) - set(inputs["classes"])
    if strange:
        raise ValueError(f"the label {min(strange)!r} is none of the classes")
    return equally_long(detections, inputs)


task = TaskSpec(
    description="Identify regions of an image that contain objects of given classes.",
    inputs={
        "image": ImageField("The image in which objects need to be detected"),
        "classes": StringListField("A list of strings that represents the catalogue of classes"),
        "config": ConfigField(),
    },
    output=Detections,
    example={"boxes": [[30, 50, 200, 300]], "labels": ["cat"], "scores": [0.95]},
    postprocess=of_the_classes,
)
wrap = task.wrap
