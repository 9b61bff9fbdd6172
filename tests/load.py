"""Clients that keep a server busy, and what became of each of their requests."""

from __future__ import annotations

import http.client
import json
import re
import select
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from PIL import Image

from tests.conftest import Server, encode_image
from tests.waiting import wait_until

#: A client gives a request up after this long, which then counts as lost. Far below REQUEST_TIMEOUT's default.
CLIENT_TIMEOUT_S = 60.0
PAUSE_S = 0.02


@dataclass(frozen=True)
class Outcome:
    """What became of a request: ``label`` is "200", "<status> <code>", "wrong answer" or "broken: <exception>"."""

    begun: float
    ended: float
    label: str


class Load:
    """Client threads, each of which sends one request after another until the ``with`` block ends.

    A client keeps its connection and makes another one where the server closed it between two requests; no request
    is ever sent twice.

    Args:
        path: of a model whose captions tell the width of the picture.
    """

    def __init__(self, server: Server, path: str, n_clients: int = 16, *, width: int = 40) -> None:
        self._address = server.url.removeprefix("http://")
        self._path = path
        self._outcomes: list[Outcome] = []
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._send, args=(width + index,), name=f"client-{index}")
            for index in range(n_clients)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(2 * CLIENT_TIMEOUT_S)
        assert not any(thread.is_alive() for thread in self._threads)

    @property
    def outcomes(self) -> list[Outcome]:
        """All requests that have ended."""
        return list(self._outcomes)

    def labels(self, which: Callable[[Outcome], bool] = lambda _: True) -> Counter[str]:
        """Count how requests ended."""
        return Counter(outcome.label for outcome in self.outcomes if which(outcome))

    def wait_for_successes(self, n: int) -> None:
        """Wait until ``n`` requests that begin from now on have succeeded."""
        now = time.monotonic()
        wait_until(lambda: self.labels(lambda outcome: outcome.begun >= now)["200"] >= n, f"{n} answers")

    def _send(self, width: int) -> None:
        body = json.dumps({"image": encode_image(Image.new("RGB", (width, 9)))})
        connection = http.client.HTTPConnection(self._address, timeout=CLIENT_TIMEOUT_S)
        while not self._ended.is_set():
            if connection.sock is not None and select.select([connection.sock], [], [], 0)[0]:
                connection.close()  # the server closed it, having nothing to answer
            begun = time.monotonic()
            try:
                connection.request("POST", self._path, body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                label = _label(response.status, json.loads(response.read()), width)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                label = f"broken: {type(error).__name__}"
            self._outcomes.append(Outcome(begun, time.monotonic(), label))
            if label != "200":
                self._ended.wait(PAUSE_S)
        connection.close()


def _label(status: int, answer: Any, width: int) -> str:
    if status != 200:
        return f"{status} {answer['code']}"
    (caption,) = answer
    return "200" if str(width) in re.split(r"\W|x", caption) else "wrong answer"
