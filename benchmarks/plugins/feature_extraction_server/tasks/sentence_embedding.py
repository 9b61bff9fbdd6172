"""The task sentence embedding: a vector for the meaning of a text."""

from feature_extraction_server.core.task import FiniteFloat, TaskSpec, TextField

task = TaskSpec(
    description="Turn a text into a vector of length 1; texts of like meaning get vectors of like direction.",
    inputs={"text": TextField("The text")},
    output=list[FiniteFloat],
)
wrap = task.wrap
