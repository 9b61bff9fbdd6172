"""The task optical character recognition: the text in an image."""

from feature_extraction_server.core.ocr import ReadText
from feature_extraction_server.core.task import ConfigField, ImageField, TaskSpec

task = TaskSpec(
    description="Read the text in an image.",
    inputs={
        "image": ImageField("The image whose text needs reading"),
        "config": ConfigField(),
    },
    output=ReadText,
    example="Feature Extraction\nServer",
)
wrap = task.wrap
