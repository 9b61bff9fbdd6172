"""A model that does nothing."""

from benchmarks.workloads import Noop

model: Noop


def load_model() -> None:
    global model
    model = Noop()


def text_echo(text: list[str]) -> list[str]:
    return model(text)
