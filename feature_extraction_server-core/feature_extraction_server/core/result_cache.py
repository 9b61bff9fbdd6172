"""Answers that are kept, to answer the same input once more without decoding it or asking the model.

They are kept in the process that has the models, one store for all web workers: a hit in one worker is then a hit in
all, the bound holds for the whole server, and whoever loads a model knows which answers are still its own. A web worker
looks a request's items up by a digest of their bytes before it decodes any of them.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from feature_extraction_server.core.errors import ServerError
from feature_extraction_server.core.to_json import to_json
from feature_extraction_server.core.tracking import RequestRecord

if TYPE_CHECKING:
    from feature_extraction_server.core.application import ApplicationInterface

logger = logging.getLogger(__name__)

#: What an answer takes besides its own bytes: its key, and its place in the store.
ENTRY_BYTES: Final = 400


@dataclass
class Counts:
    """What was looked up for a model, in items, and what is kept of it."""

    hits: int = 0
    misses: int = 0
    bytes: int = 0
    entries: int = 0


class ResultCache:
    """Keeps answers of all models up to a number of bytes; those go first that were not asked for longest.

    Every method may be called from any thread.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, tuple[str, bytes]] = OrderedDict()
        self._n_bytes = 0
        self._counts: dict[str, Counts] = {}

    def look_up(self, model: str, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the answer kept under each key, or None, and count it."""
        with self._lock:
            found: list[bytes | None] = []
            for key in keys:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    found.append(self._kept[key][1])
                else:
                    found.append(None)
            counts = self._counts.setdefault(model, Counts())
            n_hits = len(keys) - found.count(None)
            counts.hits += n_hits
            counts.misses += len(keys) - n_hits
            return found

    def count_misses(self, model: str, n: int) -> None:
        """Count items that could not be looked up, since the model does not run."""
        with self._lock:
            self._counts.setdefault(model, Counts()).misses += n

    def keep(self, model: str, key: bytes, answer: bytes) -> None:
        """Keep an answer, unless it alone is too large."""
        size = len(answer) + ENTRY_BYTES
        if size > self._max_bytes:
            return
        with self._lock:
            if key in self._kept:
                self._drop(key)
            self._kept[key] = model, answer
            self._add(model, size, 1)
            while self._n_bytes > self._max_bytes:
                self._drop(next(iter(self._kept)))

    def told(self, model: str) -> dict[str, int]:
        """Return what was looked up for a model, and what is kept of it."""
        with self._lock:
            return dict(vars(self._counts.get(model, Counts())))

    def _drop(self, key: bytes) -> None:
        model, answer = self._kept.pop(key)
        self._add(model, -len(answer) - ENTRY_BYTES, -1)

    def _add(self, model: str, n_bytes: int, n_entries: int) -> None:
        counts = self._counts.setdefault(model, Counts())
        counts.bytes += n_bytes
        counts.entries += n_entries
        self._n_bytes += n_bytes


class CachedRequest:
    """One request, as far as it can be answered from what is kept.

    Args:
        record: the request's, on the thread that works on it.
        deadline: as for ``ApplicationInterface.call``; likewise ``is_wanted``.
    """

    def __init__(
        self,
        application: ApplicationInterface,
        model: str,
        record: RequestRecord,
        deadline: float,
        is_wanted: Callable[[], bool],
    ) -> None:
        self._application = application
        self._model = model
        self._record = record
        self._deadline = deadline
        self._is_wanted = is_wanted
        record.wants_origin = True

    def complete(self, keys: Sequence[bytes], compute: Callable[[Sequence[int]], list[Any]]) -> list[Any]:
        """Return the results of a request's items, in their order.

        Args:
            keys: of each item: the same for items that are answered alike.
            compute: gives the results of the items at some places.
        """
        found = self._application.recall(self._model, keys, self._deadline, self._is_wanted)
        places = [place for place, answer in enumerate(found) if answer is None]
        self._tell(len(keys), len(places))
        if not places:
            return [json.loads(answer) for answer in found if answer is not None]
        recalled = self._identity()
        computed = compute(places)
        if len(places) < len(found) and self._identity() != recalled:
            # Started anew with other weights meanwhile: vectors of two models must not share an answer.
            places = list(range(len(found)))
            self._tell(len(keys), len(places))
            computed = compute(places)
        self._remember([keys[place] for place in places], computed)
        by_place = dict(zip(places, computed, strict=True))
        return [by_place[place] if place in by_place else json.loads(found[place] or b"") for place in range(len(keys))]

    def _identity(self) -> bytes | None:
        origin = self._record.answer_origin
        return None if origin is None else origin.identity

    def _remember(self, keys: list[bytes], results: list[Any]) -> None:
        identity = self._identity()
        if identity is None:
            return
        try:
            answers = [to_json(result) for result in results]
        except (TypeError, ValueError):  # it cannot be answered with, either
            return
        with suppress(ServerError):  # the answer is there: it is worth more than keeping it
            self._application.remember(self._model, identity, dict(zip(keys, answers, strict=True)))

    def _tell(self, n_items: int, n_missing: int) -> None:
        """Say what came from the cache, as RFC 9211 has it."""
        if not n_missing:
            self._record.cache_status = "fes; hit"
        elif n_missing == n_items:
            self._record.cache_status = "fes; fwd=miss"
        else:
            self._record.cache_status = f'fes; fwd=partial; detail="{n_items - n_missing} of {n_items} items hit"'


def is_random(config: Any) -> bool:
    """Tell whether what a request asks for is drawn by chance, so that each answer to it may be another."""
    return isinstance(config, dict) and bool(config.get("do_sample") or config.get("temperature"))
