"""The task text query embedding: a vector for what a query asks for."""

from feature_extraction_server.core.embeddings import TextEmbedding
from feature_extraction_server.core.task import ConfigField, TaskSpec, TextField

task = TaskSpec(
    description="Turn a search query into a vector that has the direction of what answers it.",
    inputs={
        "text": TextField("The query that needs embedding"),
        "config": ConfigField(),
    },
    output=TextEmbedding,
    example=[0.6, 0.0, -0.8],
)
wrap = task.wrap
