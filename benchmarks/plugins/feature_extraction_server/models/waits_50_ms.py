"""A model that waits 50 ms a call, however many items it has: a stand-in for one on an accelerator."""

import time


def load_model() -> None:
    pass


def text_echo(text: list[str]) -> list[str]:
    time.sleep(0.05)
    return text
