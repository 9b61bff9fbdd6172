"""The task face embedding: where the faces in an image are, and a vector for each."""

from typing import Any

from typing_extensions import TypedDict

from feature_extraction_server.core.detections import Box
from feature_extraction_server.core.task import ConfigField, FiniteFloat, ImageField, TaskSpec


class Face(TypedDict):
    """``box``: [xmin, ymin, xmax, ymax] in pixels of the image; ``score``: the higher, the surer it is a face."""

    box: Box
    score: FiniteFloat
    embedding: list[FiniteFloat]


def largest_first(faces: list[Face], inputs: dict[str, Any]) -> list[Face]:
    """Cut the boxes off at the image's edges, and sort the faces by the area that is left."""
    width, height = inputs["image"].size
    for face in faces:
        xmin, ymin, xmax, ymax = face["box"]
        if xmin > xmax or ymin > ymax:
            raise ValueError("a face's box ends before it begins")
        face["box"] = [max(xmin, 0), max(ymin, 0), min(xmax, width), min(ymax, height)]
    return sorted(faces, key=_area, reverse=True)


def _area(face: Face) -> float:
    xmin, ymin, xmax, ymax = face["box"]
    return (xmax - xmin) * (ymax - ymin)


task = TaskSpec(
    description="Find the faces in an image, and turn each into a vector; faces of one person have vectors that are "
    "near to each other.",
    inputs={
        "image": ImageField("The image whose faces need embedding"),
        "config": ConfigField(),
    },
    output=list[Face],
    example=[{"box": [30, 50, 130, 150], "score": 2.5, "embedding": [0.6, 0.0, -0.8]}],
    postprocess=largest_first,
)
wrap = task.wrap
