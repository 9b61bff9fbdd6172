"""The task zero-shot image classification: how probable each class of a catalogue is for an image."""

from typing import Any

from feature_extraction_server.core.task import ConfigField, ImageField, Probability, StringListField, TaskSpec


def one_for_each_class(probabilities: list[float], inputs: dict[str, Any]) -> list[float]:
    """Check that every class has its probability."""
    if len(probabilities) != len(inputs["classes"]):
        raise ValueError(f"{len(probabilities)} probabilities for {len(inputs['classes'])} classes")
    return probabilities


task = TaskSpec(
    description="Match an image to a class from a catalogue of classes.",
    inputs={
        "image": ImageField("The image that needs to be classified"),
        "classes": StringListField("A list of strings that represents the catalogue of classes"),
        "config": ConfigField(),
    },
    output=list[Probability],
    example=[0.93, 0.07],
    postprocess=one_for_each_class,
)
wrap = task.wrap
