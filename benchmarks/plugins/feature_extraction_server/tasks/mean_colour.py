"""The task mean colour: the average of an image's pixels."""

from feature_extraction_server.core.task import FiniteFloat, ImageField, TaskSpec

task = TaskSpec(
    description="Average red, green and blue of an image, each from 0 to 255.",
    inputs={"image": ImageField("The image")},
    output=list[FiniteFloat],
)
wrap = task.wrap
