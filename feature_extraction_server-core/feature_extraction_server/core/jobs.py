"""Jobs, the queue they wait in, and the batches that they are run in.

A job is one request's work for one model. Jobs of the same task with equal non-batch arguments join one batch; a job
with more items than a batch holds is spread over several. Where more texts wait than a batch holds, it takes texts of
like length, since a model pads all texts of a batch to the longest. Nothing here has a thread or a lock of its own:
the queue is guarded by the lock of the model that owns it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

from feature_extraction_server.core import torch_threads
from feature_extraction_server.core.errors import ModelError, ServerError
from feature_extraction_server.core.task import batch_key
from feature_extraction_server.core.tracking import Origin, RequestRecord, Times, current

logger = logging.getLogger(__name__)

_WINDOW: Final = 8  # batches


class Call(NamedTuple):
    """What one request asks of a model: a call of its function for ``task``.

    Args:
        task: the function's name.
        arguments: its keyword arguments; those named in ``batch_fields`` are lists with one element an item.
        batch_fields: empty for a task that declares none: the call is then one item and is never joined with others.
        positional: its positional arguments, which only a task without declared fields may use.
        n_items: how many items it has, where that is not to be seen from ``arguments``.
        rest: gives the other arguments, such as take much memory: asked on the thread that waits for the result, when
            the call is soon to be run. None: there are no others.
    """

    task: str
    arguments: dict[str, Any]
    batch_fields: tuple[str, ...] = ()
    positional: tuple[Any, ...] = ()
    n_items: int | None = None
    rest: Callable[[], dict[str, Any]] | None = None


class Job:
    """A call that waits for its model, and then for its result.

    Args:
        is_complete: False where ``complete`` is to be called with other arguments, as for a call that has a ``rest``.
    """

    def __init__(self, call: Call, *, is_complete: bool = True) -> None:
        self.task, self.positional = call.task, call.positional
        self.future: Future[Any] = Future()
        self.rest = call.rest
        self.is_complete = is_complete and call.rest is None
        #: Done when the rest of the arguments is wanted; None where there is no rest.
        self.due: Future[None] | None = None if self.is_complete else Future()
        self._batch_fields = call.batch_fields
        self._set_arguments(call.arguments)
        self.n_items = call.n_items or (len(next(iter(self.batched.values()))) if self.batched else 1)
        self.n_taken = 0
        self.request = current.get()
        self.origin: Origin | None = None  # where its results come from
        self._queued = self._asked = time.monotonic()
        self._began: float | None = None
        self._ended: float | None = None
        self._batch_items = 0
        self._order: list[int] | None = None  # which item the client sent where; None: as they are
        self._results: list[Any] = [None] * self.n_items
        self._n_missing = self.n_items
        self._counting = threading.Lock()  # several processes of a model may work on it at a time

    def _set_arguments(self, arguments: dict[str, Any]) -> None:
        self.batched = {key: value for key, value in arguments.items() if key in self._batch_fields}
        self.shared = {key: value for key, value in arguments.items() if key not in self._batch_fields}
        self._joins = (self.task, tuple(self.batched), batch_key(self.shared)) if self.batched else None

    def ask_for_rest(self) -> None:
        """Tell the waiter that the rest of the arguments is wanted. May be said more than once."""
        if (due := self.due) is not None and not due.done():
            self._asked = time.monotonic()
            self._settle(lambda: due.set_result(None))

    def complete(self, rest: dict[str, Any]) -> None:
        """Take the rest of the arguments. What it took to get them is not the time that the job has waited."""
        self._set_arguments(self.shared | self.batched | rest)
        self._queued += time.monotonic() - self._asked
        self.is_complete = True

    def joins(self, other: Job) -> bool:
        """Tell whether both may be answered by one call of the model's function."""
        return self._joins is not None and self._joins == other._joins

    @cached_property
    def length(self) -> int:
        """How many characters its longest item has; 0 where the items are no texts."""
        return max(self._lengths(), default=0)

    def sort_by_length(self) -> None:
        """Put the items in the order of their lengths. The results come in the order that they were sent in."""
        self._order = sorted(range(self.n_items), key=self._lengths().__getitem__)
        self.batched = {key: [items[index] for index in self._order] for key, items in self.batched.items()}

    def _lengths(self) -> list[int]:
        texts = [items for items in self.batched.values() if items and isinstance(items[0], str)]
        return [sum(map(len, item)) for item in zip(*texts, strict=True)] if texts else [0] * self.n_items

    def begin(self, now: float, batch_items: int) -> float | None:
        """Note that the model is called for some of it; the first time, return how many seconds it has waited."""
        self._batch_items = max(self._batch_items, batch_items)
        if self._began is not None:
            return None
        self._began = now
        return now - self._queued

    def pause(self, now: float) -> None:
        """Note that a call of the model for some of it has ended."""
        self._ended = now

    def times(self) -> Times:
        """Return how long it waited and was worked on, so far."""
        if self._began is None:
            return Times(time.monotonic() - self._queued, 0.0, self.n_items, 0)
        ended = time.monotonic() if self._ended is None else self._ended
        return Times(self._began - self._queued, ended - self._began, self.n_items, self._batch_items)

    @property
    def ended(self) -> bool:
        return self.future.done()

    def succeed(self, start: int, results: list[Any]) -> None:
        """Take the results of the items from ``start`` on. The last ones to come answer the waiter."""
        n = len(results)
        self._results[start : start + n] = results
        with self._counting:
            self._n_missing -= n
            if self._n_missing:
                return
        if self._order is not None:
            in_order = dict(zip(self._order, self._results, strict=True))
            self._results = [in_order[index] for index in range(self.n_items)]
        self._settle(lambda: self.future.set_result(self._results if self.batched else self._results[0]))

    def fail(self, error: ServerError) -> None:
        """Answer the waiter with an error, unless it has an answer already."""
        if (due := self.due) is not None:
            self._settle(lambda: due.set_exception(error))
        self._settle(lambda: self.future.set_exception(error))

    def cancel(self) -> None:
        """Give the job up: its waiter has left. What still waits of it is not run."""
        self.future.cancel()

    @staticmethod
    def _settle(answer: Callable[[], None]) -> None:
        with suppress(InvalidStateError):  # cancelled, or failed meanwhile by a stop or another item
            answer()


def fail_all(jobs: Iterable[Job], error: ServerError) -> None:
    """Answer the waiters of several jobs with an error, each with one of its own: it is raised in each one's thread."""
    for job in jobs:
        job.fail(type(error)(error.message, retry_after=error.retry_after))


@dataclass(frozen=True)
class Piece:
    """The items ``start`` to ``stop`` of a job, which one batch runs."""

    job: Job
    start: int
    stop: int


def _record_of(pieces: list[Piece]) -> RequestRecord | None:
    """Return what tells in the log whose call it is: the ids of all requests that share it."""
    if len(pieces) == 1:
        return pieces[0].job.request
    ids = dict.fromkeys(piece.job.request.id for piece in pieces if piece.job.request is not None)
    return RequestRecord(",".join(ids)) if ids else None


class Batch:
    """What one call of a model's function runs. A consumer calls ``run()`` on each batch it fetches.

    Args:
        measure: takes what a call did: the task, how many items it had, for how many seconds jobs had waited that
            it was the first call for, and how many seconds it took.
        origin: where the results come from.
    """

    def __init__(
        self,
        model: str,
        module: Any,
        pieces: list[Piece],
        measure: Callable[[str, int, list[float], float], None] = lambda *measured: None,
        origin: Origin | None = None,
    ) -> None:
        self.module = module  # whatever has the model's functions as attributes
        self.pieces = pieces
        self._model = model
        self._measure = measure
        self._origin = origin

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for any of it any more."""
        return all(piece.job.ended for piece in self.pieces)

    def run(self, *, computes_here: bool = True) -> None:
        """Call the model's function and answer the jobs. Raises nothing, whatever the function raises.

        Afterwards the batch has no pieces any more: a consumer that waits for the next one holds on to no pictures.

        Args:
            computes_here: whether the call takes this machine's cores, of which other models then get fewer.
        """
        with torch_threads.at_work() if computes_here else nullcontext():
            self._run(self.pieces)
        self.pieces = []
        current.set(None)

    def _run(self, pieces: list[Piece]) -> None:
        pieces = [piece for piece in pieces if not piece.job.ended]
        if not pieces:
            return
        current.set(_record_of(pieces))
        error = self._try(pieces)
        if error is None:
            return
        if len(pieces) == 1:
            pieces[0].job.fail(error)
            return
        # One of the joined jobs may be the cause, or all of them were too much at once: try each half apart.
        middle = len(pieces) // 2
        self._run(pieces[:middle])
        self._run(pieces[middle:])

    def _try(self, pieces: list[Piece]) -> ServerError | None:
        n_items = sum(piece.stop - piece.start for piece in pieces)
        try:
            results = self._call(pieces)
            results = self._as_list(results) if pieces[0].job.batched else [results]
            if len(results) != n_items:
                raise ModelError(f"the model {self._model} gave {len(results)} results for {n_items} items")
        except ServerError as error:
            return error.with_traceback(None)
        except BaseException as error:  # SystemExit too: whatever a model raises is the job's error, not the consumer's
            task = pieces[0].job.task
            logger.exception("The model %s failed on the task %s (%d items)", self._model, task, n_items)
            return ModelError(f"the model {self._model} failed: {type(error).__name__}: {error}")
        for piece in pieces:
            n = piece.stop - piece.start
            piece.job.succeed(piece.start, results[:n])
            results = results[n:]
        return None

    def _as_list(self, results: Any) -> list[Any]:
        if isinstance(results, (str, bytes, dict)):  # their characters and keys would pass for results
            raise ModelError(
                f"the model {self._model} gave a {type(results).__name__}, not a list with one result an item"
            )
        return list(results)

    def _call(self, pieces: list[Piece]) -> Any:
        first = pieces[0].job
        n_items = sum(piece.stop - piece.start for piece in pieces)
        batched = {
            key: [item for piece in pieces for item in piece.job.batched[key][piece.start : piece.stop]]
            for key in first.batched
        }
        began = time.monotonic()
        waits = [wait for piece in pieces if (wait := piece.job.begin(began, n_items)) is not None]
        try:
            return getattr(self.module, first.task)(*first.positional, **batched, **first.shared)
        finally:
            ended = time.monotonic()
            for piece in pieces:
                piece.job.pause(ended)
                piece.job.origin = self._origin
            self._measure(first.task, n_items, waits, ended - began)


class JobQueue:
    """The jobs that wait for a model, first come, first served."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()
        self._may_lack_arguments = False  # whether any job may have to be asked for its rest

    def __len__(self) -> int:
        return sum(not job.ended for job in self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    def is_full(self, max_jobs: int) -> bool:
        """Tell whether ``max_jobs`` wait already. They are counted only where there may be as many."""
        return len(self._jobs) >= max_jobs and len(self) >= max_jobs

    def put(self, job: Job) -> None:
        self._jobs.append(job)
        self._may_lack_arguments |= not job.is_complete

    def discard(self, job: Job) -> None:
        """Take a job out that nobody waits for any more, with its pictures, if it is there."""
        with suppress(ValueError):
            self._jobs.remove(job)

    def ask_for_rest(self, n_items: int) -> None:
        """Ask those jobs for the rest of their arguments that have fewer than ``n_items`` items before them.

        A job counts for a quarter of them at most: a large one is decoded for long, and must keep no small one waiting.
        """
        if not self._may_lack_arguments:
            return
        most_of_one = max(1, n_items // 4)
        for job in self._jobs:
            if job.ended:
                continue
            if n_items <= 0:
                return
            job.ask_for_rest()
            n_items -= min(job.n_items - job.n_taken, most_of_one)
        self._may_lack_arguments = False

    def take(self, max_items: int, least_items: float = 1) -> list[Piece]:
        """Take the first complete job that still has a waiter and all that joins it, ``max_items`` items at most.

        Where that is less than ``least_items``, nothing is taken.

        Where more joins it, those go with it that are most like it in length: the first one never waits for them. A
        first job that is larger than a batch then goes to the end, so that it keeps nobody waiting for all of it.
        """
        if least_items > max_items:
            return []
        waiting = [job for job in self._jobs if not job.ended]
        company = self._company([job for job in waiting if job.is_complete], max_items)
        if sum(job.n_items - job.n_taken for job in company) < least_items:
            return []
        pieces: list[Piece] = []
        room = max_items
        for job in company:
            n = min(room, job.n_items - job.n_taken)
            pieces.append(Piece(job, job.n_taken, job.n_taken + n))
            job.n_taken += n
            room -= n
        self._jobs = deque(job for job in waiting if job.n_taken < job.n_items)
        if pieces and pieces[0].job.n_taken < pieces[0].job.n_items:
            self._jobs.remove(pieces[0].job)
            self._jobs.append(pieces[0].job)
        return pieces

    @staticmethod
    def _company(waiting: list[Job], max_items: int) -> list[Job]:
        """Return the first job and those that share its batch, in the order in which they came."""
        if not waiting:
            return []
        first = waiting[0]
        if first.n_items > max_items and not first.n_taken:
            first.sort_by_length()
        # No further, so that a search takes no longer than the batch.
        joining = [first, *(job for job in waiting[1 : _WINDOW * max_items] if job.joins(first))]
        if sum(job.n_items - job.n_taken for job in joining) > max_items:
            joining.sort(key=lambda job: abs(job.length - first.length))  # stable: who came first stays first
        chosen, room = [], max_items
        for job in joining:
            if room <= 0:
                break
            chosen.append(job)
            room -= job.n_items - job.n_taken
        return chosen
