"""The task text embedding: a vector for what a text means."""

from feature_extraction_server.core.embeddings import TextEmbedding
from feature_extraction_server.core.task import ConfigField, TaskSpec, TextField

task = TaskSpec(
    description="Turn a text into a vector; texts that mean alike things have vectors of like direction.",
    inputs={
        "text": TextField("The text that needs embedding"),
        "config": ConfigField(),
    },
    output=TextEmbedding,
    example=[0.6, 0.0, -0.8],
)
wrap = task.wrap
