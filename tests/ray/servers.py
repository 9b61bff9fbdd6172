"""What tests ask of servers whose models run on a Ray cluster."""

from __future__ import annotations

from functools import partial
from typing import Any

import psutil
import requests
from PIL import Image

from tests.conftest import Server, encode_image
from tests.waiting import wait_until

MODELS = ("fake_echo", "fake_slow", "fake_fragile", "fake_broken", "fake_flaky")
ECHO, SLOW, FRAGILE, BROKEN, FLAKY = (f"/api/models/{model}/tasks/image_captioning/features" for model in MODELS)
#: How long a call of ``fake_slow`` takes.
SLOW_S = 0.4


def ask(server: Server, path: str, width: int = 40) -> requests.Response:
    return server.post(path, {"image": encode_image(Image.new("RGB", (width, 9), "red"))})


def status(server: Server, model: str) -> dict[str, Any]:
    answer: dict[str, Any] = server.get(f"/api/models/{model}/status").json()
    return answer


def has_state(server: Server, model: str, state: str) -> bool:
    return bool(status(server, model)["state"] == state)


def start_model(server: Server, model: str) -> None:
    server.post(f"/api/models/{model}/start", {})
    wait_until(partial(has_state, server, model, "running"), f"the start of {model}")


def stop_model(server: Server, model: str) -> None:
    server.post(f"/api/models/{model}/stop", {})
    wait_until(partial(has_state, server, model, "stopped"), f"the stop of {model}")


def replicas(server: Server, model: str) -> list[dict[str, Any]]:
    """Return those that are ready."""
    return [one for one in status(server, model)["replicas"] if one["state"] == "running"]


def pids(server: Server, model: str) -> set[int]:
    return {one["pid"] for one in replicas(server, model)}


def pids_of_fragile(server: Server) -> set[int]:
    """Return the processes of the two replicas of ``fake_fragile`` when they are ready."""
    if not has_state(server, "fake_fragile", "running"):
        start_model(server, "fake_fragile")
    wait_until(lambda: len(pids(server, "fake_fragile")) == 2, "two replicas")
    return pids(server, "fake_fragile")


def driver_of(server: Server, model: str) -> psutil.Process:
    """Return the process that speaks with Ray for the server's engine."""
    engine = psutil.Process(status(server, model)["engine_pid"])
    (driver,) = (one for one in engine.children() if any("ray_consumer" in part for part in one.cmdline()))
    return driver
