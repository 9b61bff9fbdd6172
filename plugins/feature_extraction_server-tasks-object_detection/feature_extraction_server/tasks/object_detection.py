"""The task object detection: where in an image which objects are."""

from feature_extraction_server.core.detections import Detections, equally_long
from feature_extraction_server.core.task import ConfigField, ImageField, TaskSpec

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
