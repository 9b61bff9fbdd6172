"""The task image classification: which of the classes that a model knows an image shows."""

from typing import Any

from typing_extensions import TypedDict

from feature_extraction_server.core.config import DEFAULT_TOP_K, ClassificationConfig, check_config
from feature_extraction_server.core.task import ConfigField, ImageField, Probability, TaskSpec


class Classes(TypedDict):
    """The names of the most probable classes and their probabilities, best first."""

    labels: list[str]
    scores: list[Probability]


def best_first(classes: dict[str, list[Any]], inputs: dict[str, Any]) -> dict[str, list[Any]]:
    """Put the most probable classes first, and leave out those beyond ``config.top_k``."""
    if len(classes["labels"]) != len(classes["scores"]):
        raise ValueError("labels and scores are not equally many")
    asked = {key: value for key, value in inputs["config"].items() if key == "top_k"}
    top_k = check_config(ClassificationConfig, asked).get("top_k", DEFAULT_TOP_K)  # the model may not have checked it
    each = zip(classes["labels"], classes["scores"], strict=True)
    best = sorted(each, key=lambda one: one[1], reverse=True)[:top_k]
    return {"labels": [label for label, _ in best], "scores": [score for _, score in best]}


task = TaskSpec(
    description="Tell which of the classes that a model knows an image shows.",
    inputs={
        "image": ImageField("The image that needs to be classified"),
        "config": ConfigField(),
    },
    output=Classes,
    example={"labels": ["tabby cat", "tiger cat"], "scores": [0.81, 0.12]},
    postprocess=best_first,
)
wrap = task.wrap
