"""The task automated speech recognition: the words that are spoken in a recording."""

from feature_extraction_server.core.task import AudioField, ConfigField, TaskSpec

task = TaskSpec(
    description="Generate text from speech.",
    inputs={
        "audio": AudioField("The audio from which the speech needs to be generated"),
        "config": ConfigField(),
    },
    output=str,
)
wrap = task.wrap
