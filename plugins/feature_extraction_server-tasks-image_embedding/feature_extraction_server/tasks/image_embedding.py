"""The task image embedding: a vector for what an image shows."""

from feature_extraction_server.core.task import ConfigField, FiniteFloat, ImageField, TaskSpec

task = TaskSpec(
    description="Turn an image into a vector; images that show alike things have vectors of like direction.",
    inputs={
        "image": ImageField("The image that needs embedding"),
        "config": ConfigField(),
    },
    output=list[FiniteFloat],
    example=[0.6, 0.0, -0.8],
)
wrap = task.wrap
