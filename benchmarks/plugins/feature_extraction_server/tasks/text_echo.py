"""The task text echo: a text comes back as it is."""

from feature_extraction_server.core.task import TaskSpec, TextField

task = TaskSpec(description="Send a text back.", inputs={"text": TextField("The text")}, output=str)
wrap = task.wrap
