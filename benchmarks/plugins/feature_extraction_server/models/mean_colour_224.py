"""Averages an image that it has resized to 224 x 224 pixels."""

from PIL.Image import Image

from benchmarks.workloads import MeanColour

image_sizes = {"mean_colour": 224}
model: MeanColour


def load_model() -> None:
    global model
    model = MeanColour()


def mean_colour(image: list[Image]) -> list[list[float]]:
    return model(image)
