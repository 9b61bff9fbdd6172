"""The task image captioning: text captions that describe the visual content of an image."""

from feature_extraction_server.core.task import ConfigField, ImageField, TaskSpec

task = TaskSpec(
    description="Generate text captions that describe the visual content of an image.",
    inputs={
        "image": ImageField("The image that needs captioning"),
        "config": ConfigField(),
    },
    output=list[str],
    example=["a cat that is sitting on a table"],
)
wrap = task.wrap
