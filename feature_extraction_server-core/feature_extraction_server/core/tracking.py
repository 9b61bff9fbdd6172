"""What is noted of a request on its way: its id, what it runs, and how long that takes.

The thread that works on a request has its record as ``current``, in whichever process: log lines take the request's id
from there, and the engine notes the times there, which go back to the web worker with the answer.
"""

from __future__ import annotations

import random
import re
import time
from bisect import bisect_left
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_ITEMS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_ID: Final = re.compile(r"[!-~]{1,128}")


class Times(NamedTuple):
    """What a model did for a request.

    Args:
        queued_s: until the model's function was called for the first of its items, loading included.
        computed_s: from then until the last call for it had ended.
        n_items: how many items the request has.
        batch_items: how many items the largest call had that it shared with other requests.
    """

    queued_s: float
    computed_s: float
    n_items: int
    batch_items: int


class Origin(NamedTuple):
    """Where an answer comes from.

    Args:
        identity: the same for answers that may stand for one another; of a model and what it has loaded.
        provenance: ``checkpoint``, ``revision``, ``dtype`` and ``device``, as far as they are known.
    """

    identity: bytes
    provenance: dict[str, str | None]


class RequestRecord:
    """A request. For one thread at a time.

    Args:
        origin: the page that it comes from, as its browser says.
    """

    __slots__ = ("answer_origin", "began", "cache_status", "id", "model", "origin", "task", "times", "wants_origin")

    def __init__(self, id: str, origin: str | None = None) -> None:
        self.id = id
        self.origin = origin
        self.wants_origin = False  # whether the engine is to tell where the answer comes from
        self.answer_origin: Origin | None = None
        self.cache_status: str | None = None  # as HTTP's header Cache-Status has it; None: no cache was asked
        self.began = time.monotonic()
        self.task: str | None = None
        self.model: str | None = None
        self.times: Times | None = None  # None: it has not come to a model

    def add(self, times: Times) -> None:
        """Note what a model did; a task may well call it several times."""
        if self.times is not None:
            before = self.times
            times = Times(
                before.queued_s + times.queued_s,
                before.computed_s + times.computed_s,
                before.n_items + times.n_items,
                max(before.batch_items, times.batch_items),
            )
        self.times = times


#: The record of the request that this thread works on.
current: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


def new_id() -> str:
    """Return an id that no other request has."""
    return f"{random.getrandbits(96):024x}"  # no secret, so that it need not ask the system for randomness


def is_id(text: str) -> bool:
    """Tell whether what a client sent can be an id: 1 to 128 printable characters of ASCII, no spaces."""
    return _ID.fullmatch(text) is not None


class Histogram:
    """How many values lie below each of some bounds, and their sum. For one thread at a time."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def told(self) -> dict[str, Any]:
        """Return the bounds, the counts of the values between them (one more than there are bounds), and the sum."""
        return {"bounds": list(self._bounds), "counts": list(self._counts), "sum": self._sum}


class TaskMeasurements:
    """What a model did for a task, since the engine's start."""

    def __init__(self) -> None:
        self.queue_s = Histogram(_SECONDS)  # one value a job
        self.inference_s = Histogram(_SECONDS)  # one value a call of the model's function
        self.batch_items = Histogram(_ITEMS)  # likewise

    def told(self) -> dict[str, Any]:
        return {
            "queue_seconds": self.queue_s.told(),
            "inference_seconds": self.inference_s.told(),
            "batch_items": self.batch_items.told(),
        }
