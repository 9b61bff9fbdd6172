"""A model's life: its state, its queue, and the consumer that runs its jobs.

``Model`` outlives its starts and stops; each start makes a ``ModelRun``, which the consumer receives and knows the
model by. All state is guarded by one lock a model, which is never held while something is loaded, run or answered:
the new state is set first, the waiters are answered last, so that who is answered sees it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from types import ModuleType
from typing import Any, Final, Protocol

from feature_extraction_server.core import patience
from feature_extraction_server.core.cores import N_CORES
from feature_extraction_server.core.errors import (
    ClientDisconnected,
    DeadlineExceeded,
    ModelLoadFailed,
    ModelUnavailable,
    QueueFull,
    ServerError,
    too_late,
)
from feature_extraction_server.core.jobs import Batch, Job, JobQueue, fail_all
from feature_extraction_server.core.logs import LogServer
from feature_extraction_server.core.memory import give_back_memory
from feature_extraction_server.core.progress import Download, report
from feature_extraction_server.core.provenance import origin_of, provenance_of
from feature_extraction_server.core.resources import resident_bytes
from feature_extraction_server.core.tracking import Origin, TaskMeasurements

logger = logging.getLogger(__name__)


class State(StrEnum):
    STOPPED = "stopped"
    STARTING = "starting"
    LOADING = "loading"
    RUNNING = "running"
    STOPPING = "stopping"
    FAILED = "failed"


#: How long a model that has failed waits at least until it is started again by itself, and how many times the retry
#: delay it waits at most.
MIN_RETRY_DELAY_S: Final = 1.0
MAX_RETRY_DELAYS: Final = 32
_STARTING: Final = (State.STARTING, State.LOADING)
_ON_ITS_WAY: Final = (State.STARTING, State.LOADING, State.RUNNING)


class ConsumerHandle(Protocol):
    """What a consumer's ``start`` returns: a thread, a process, or anything that tells as much."""

    def is_alive(self) -> bool: ...

    def join(self, timeout: float | None = None) -> Any: ...


@dataclass(frozen=True)
class ModelOptions:
    """How a model is run; all times in seconds. See the settings of the same names."""

    result_check_interval: float = 0.1
    max_queue_size: int = 1024
    max_batch_size: int = 32
    stop_grace_period: float = 30
    load_retry_delay: float = 10
    idle_timeout: float = 0  # never
    n_replicas: int = 1

    @property
    def n_decoded_ahead(self) -> int:
        """How many items may wait with pictures or recordings that are decoded: what is run next, and what keeps
        every core decoding meanwhile.
        """
        return max(self.max_batch_size * self.n_replicas, 2 * N_CORES)


class ModelRun:
    """One life of a model, from a start to the stop after it. This is what a consumer's ``start`` receives.

    The consumer calls ``load_model()`` and then ``run()`` on each job that ``fetch_jobs()`` yields, all where the
    model is to live.
    """

    def __init__(self, model: Model, queue: JobQueue) -> None:
        self.name: Final = model.name
        self.options: Final = model.options
        self.module: Any = model.module  # what has the model's functions; a consumer may put something in its place
        self.queue: Final = queue
        # Accepted and not yet answered, the ones in a batch included.
        self.jobs: Final[set[Job]] = {job for job in queue if not job.ended}
        self.pids: Callable[[], list[int]] = lambda: [os.getpid()]  # where the model lives on this machine
        self.replicas: Callable[[], list[dict[str, Any]]] = self._one_a_process
        # How many items must wait for the next batch. A consumer that may run several at a time may ask for more.
        self.least_items: Callable[[], float] = lambda: 1
        self.stop_was_asked = False  # by a client, not by a limit or the end of the server
        self.origin: Origin | None = None  # of its answers; known once it is loaded
        self.download: Download | None = None  # what is on its way, while the model loads
        self.loaded = False
        self.ended = False
        self.handle: ConsumerHandle | None = None
        self.grace_timer: threading.Timer | None = None
        self._model = model
        self._globals_before: dict[str, Any] = {}

    def _one_a_process(self) -> list[dict[str, Any]]:
        return [{"node": None, "pid": pid, "state": "running" if self.loaded else "loading"} for pid in self.pids()]

    @property
    def has_dead_consumer(self) -> bool:
        """Whether its consumer died without a word."""
        return not self.ended and self.handle is not None and not self.handle.is_alive()

    @property
    def is_wanted(self) -> bool:
        """Whether the model is to go on running: it was not stopped, and has not failed."""
        return not self.ended and self._model.state is not State.STOPPING

    @property
    def is_needed(self) -> bool:
        """Whether the model is to go on running, or at least to answer jobs that it accepted before it was stopped."""
        return self.is_wanted or (not self.ended and not all(job.ended for job in list(self.jobs)))

    def load_model(self) -> None:
        """Load the model. A failure is recorded and logged, not raised: ``fetch_jobs`` then ends at once."""
        if not self._model._begin_loading(self):
            return
        module = self.module
        self._globals_before = dict(vars(module))
        started = time.monotonic()
        failure: ModelUnavailable | None = None
        reports = report.set(self._take_report)
        try:
            module.load_model()
        except BaseException as error:  # SystemExit too: a model that fails to load must not take the consumer along
            if self.is_wanted:
                logger.exception("The model %s failed to load", self.name)
            failure = self._failure_of(error)
        finally:
            report.reset(reports)
        if failure is None:
            self.loaded = True
            self.origin = origin_of(self.name, provenance_of(module))
            self._model._load_succeeded(self, time.monotonic() - started)
        else:
            # Only now has the traceback let go of what was loaded so far.
            self._drop_globals()
            give_back_memory()
            self._model._load_failed(self, failure)

    def _failure_of(self, error: BaseException) -> ModelUnavailable:
        """Return what requests are told of a load that failed. What passes by itself is no fault of the model's."""
        passes = isinstance(error, ModelUnavailable) and error.retry_after is not None
        kind = ModelUnavailable if passes and not isinstance(error, ModelLoadFailed) else ModelLoadFailed
        reason = f"the model {self.name} failed to load: {_describe(error)}"
        return kind(reason, retry_after=self.options.load_retry_delay)

    def progress(self) -> dict[str, Any]:
        """Return how far the model's start has come: what it is at, and how much of a download is done."""
        download = self.download
        return {"stage": "loading", "bytes_done": None, "bytes_total": None} if download is None else download.told()

    def _take_report(self, download: Download | None) -> None:
        self.download = download

    def fetch_jobs(self) -> Iterator[Batch]:
        """Yield what is to be run next; block while there is nothing. Ends when the model is stopped."""
        try:
            while (batch := self._model._next_batch(self)) is not None:
                yield batch
        finally:
            self.end("its consumer left")

    def reconsider(self) -> None:
        """Have ``least_items`` asked again, which now says something else."""
        with self._model._changed:
            self._model._changed.notify_all()

    def stop(self) -> None:
        """Stop the model here because it was stopped elsewhere; no client asks this server for it."""
        if self.is_wanted:
            self._model.stop(asked=False)

    def end(self, reason: str, retry_after: float | None = None) -> None:
        """Unload the model and leave the run.

        Args:
            reason: tells why, where nobody asked for it.
            retry_after: in how many seconds those who wait may try again, where that is known.
        """
        if not self._model._claim_end(self):
            return
        if self.loaded:
            self._unload()
        self._model._run_ended(self, reason, retry_after)

    def _unload(self) -> None:
        unload_model = getattr(self.module, "unload_model", None)
        try:
            if unload_model is not None:
                unload_model()
        except BaseException:  # as for load_model
            logger.exception("The model %s failed in unload_model", self.name)
            unload_model = None
        if unload_model is None:
            self._drop_globals()
        self.loaded = False
        give_back_memory()

    def _drop_globals(self) -> None:
        """Give the module's globals the values that they had before ``load_model`` set them."""
        namespace = vars(self.module)
        for name, value in list(namespace.items()):
            if name not in self._globals_before:
                del namespace[name]
            elif value is not self._globals_before[name]:
                namespace[name] = self._globals_before[name]
        self._globals_before = {}


class Model:
    """One model plugin and its life. Every method may be called from any thread.

    Args:
        name: the plugin's name.
        module: the plugin's module.
        consumer_type: which consumer runs it.
        start_consumer: that consumer's ``start``.
    """

    def __init__(
        self,
        name: str,
        module: ModuleType,
        consumer_type: str,
        start_consumer: Callable[[ModelRun, LogServer], ConsumerHandle],
        log_server: LogServer,
        options: ModelOptions | None = None,
    ) -> None:
        self.name: Final = name
        self.module: Final = module
        self.consumer_type: Final = consumer_type
        self._start_consumer = start_consumer
        self._log_server = log_server
        self.options: Final = options or ModelOptions()
        self._changed = threading.Condition(threading.Lock())
        self._state = State.STOPPED
        self._error: str | None = None
        self._failure: type[ModelUnavailable] = ModelLoadFailed  # what it failed to load with
        self._retry_at = 0.0
        self._state_since = time.monotonic()
        self._load_seconds: float | None = None
        self._n_loads = self._n_failed_loads = self._n_failed_in_a_row = 0
        self._has_failed = False  # since it was last loaded
        self.n_stops = 0  # that were asked for
        self._n_jobs = self._n_items = self._n_failures = 0
        self._last_used = time.monotonic()
        self._measuring = threading.Lock()
        self._measured: dict[str, TaskMeasurements] = {}
        self._run: ModelRun | None = None
        self._restart = False
        self._next_queue = JobQueue()  # the jobs that came while stopping: they wait for the next run

    # What requests do

    def start(self) -> None:
        """Start the model unless it runs or is about to. Returns at once; of a crossing stop the later wins."""
        self.notice_dead_consumer()
        with self._changed:
            run = self._start_locked()
        self._launch(run)

    def retry(self) -> None:
        """Start the model again if it has failed and the retry delay has passed. Returns at once.

        The delay, a second at least, doubles with each load that fails, up to ``MAX_RETRY_DELAYS`` times its length.
        """
        with self._changed:
            n_delays = min(2 ** max(0, self._n_failed_in_a_row - 1), MAX_RETRY_DELAYS)
            retry_at = self._state_since + n_delays * max(self.options.load_retry_delay, MIN_RETRY_DELAY_S)
            if self._state is not State.FAILED or time.monotonic() < retry_at:
                return
            run = self._new_run()
        self._launch(run)

    def stop(self, *, asked: bool = True) -> None:
        """Stop the model. Returns at once; accepted jobs may finish within the grace period, then get a 503.

        Args:
            asked: whether a client wants it; otherwise a limit does, or the end of the server.
        """
        self.notice_dead_consumer()
        with self._changed:
            self.n_stops += asked
            self._has_failed &= not asked  # who stops it wants no more of it until it is asked for
            self._restart = False
            orphans = list(self._next_queue)
            self._next_queue = JobQueue()
            if self._state is State.FAILED:
                self._set_state(State.STOPPED)
            elif self._state in _ON_ITS_WAY:
                assert self._run is not None
                self._run.stop_was_asked = asked
                self._set_state(State.STOPPING)
                if self._run.jobs:
                    self._set_grace_timer(self._run)
        fail_all(orphans, ModelUnavailable(f"the model {self.name} was stopped"))

    def submit(self, job: Job) -> None:
        """Queue a job, and start the model where it does not run.

        Raises:
            QueueFull: as many jobs wait as may.
            ModelLoadFailed, ModelUnavailable: the model failed to load less than the retry delay ago.
        """
        self.notice_dead_consumer()
        with self._changed:
            self.require_retry()
            run = self._start_locked()
            # A stopping model takes no more into this life: the job waits for the next one.
            queue = self._next_queue if self._state is State.STOPPING else self._current_run().queue
            accepted = not queue.is_full(self.options.max_queue_size)
            if accepted:
                self._last_used = time.monotonic()
                self._n_jobs += 1
                self._n_items += job.n_items
                queue.put(job)
                queue.ask_for_rest(self.options.n_decoded_ahead)
            if accepted and queue is not self._next_queue:
                self._current_run().jobs.add(job)
                if job.is_complete:
                    self._changed.notify_all()
        self._launch(run)
        if not accepted:
            raise QueueFull(
                f"the queue of the model {self.name} is full: {self.options.max_queue_size} jobs wait already "
                "(MAX_QUEUE_SIZE)",
                retry_after=1,
            )

    @patience.counted()
    def wait(self, job: Job, deadline: float, is_wanted: Callable[[], bool] = lambda: True) -> Any:
        """Return the job's result as soon as it is there. The rest of its arguments is got on this thread.

        Args:
            deadline: when to give up, on the clock of ``time.monotonic()``.
            is_wanted: asked now and then whether somebody still waits for the result.

        Raises:
            DeadlineExceeded: no result by then; what is left of the job is not run.
            ClientDisconnected: nobody waits for it; what is left of the job is not run.
            ServerError: the job failed, or the model; or what ``rest`` of the job's call raised.
        """
        failed = False
        try:
            if job.due is not None and job.rest is not None:
                self._wait_for(job.due, deadline, is_wanted)
                self.complete(job, job.rest())
            return self._wait_for(job.future, deadline, is_wanted)
        except ServerError as error:
            failed = error.status >= 500
            raise
        finally:
            job.cancel()
            self.leave(job, failed=failed)

    def _wait_for(self, future: Future[Any], deadline: float, is_wanted: Callable[[], bool]) -> Any:
        while (remaining := deadline - time.monotonic()) > 0:
            interval_s = patience.look_interval_s(self.options.result_check_interval)
            try:
                return future.result(timeout=min(interval_s, remaining))
            except TimeoutError:
                self.notice_dead_consumer()
                if not is_wanted():
                    raise ClientDisconnected("the client has gone") from None
        raise too_late(self.name)

    def complete(self, job: Job, rest: dict[str, Any]) -> None:
        """Give a job the rest of its arguments."""
        with self._changed:
            job.complete(rest)
            self._changed.notify_all()

    def leave(self, job: Job, *, failed: bool = False) -> None:
        """Have no more to do with a job: it has its result, or was given up. Who waits for it hears of that later.

        Args:
            failed: whether its answer is a 5xx.
        """
        with self._changed:
            self._n_failures += failed
            self._last_used = time.monotonic()
            if self._run is not None:
                self._run.jobs.discard(job)
            for queue in self._queues():
                if job.n_taken < job.n_items:  # while nothing is taken, as while the model loads, it would stay
                    queue.discard(job)
                queue.ask_for_rest(self.options.n_decoded_ahead)

    def wait_for_state(self, states: Iterable[State], deadline: float) -> State:
        """Wait until the model is in one of ``states``, and return which.

        Raises:
            DeadlineExceeded: it was in none of them by then.
        """
        states = tuple(states)
        while (remaining := deadline - time.monotonic()) > 0:
            self.notice_dead_consumer()
            with self._changed:
                if self._changed.wait_for(
                    lambda: self._state in states, min(self.options.result_check_interval, remaining)
                ):
                    return self._state
        raise DeadlineExceeded(f"the model {self.name} is still {self._state} (REQUEST_TIMEOUT)")

    def status(self) -> dict[str, Any]:
        """Return the model's state as a JSON-ready dict.

        ``state_seconds`` is how long it has been in its state, ``progress`` how far its start has come (None when it is
        not starting), ``load_seconds`` how long its last load took, ``pids`` the processes of this machine that it runs
        in, ``replicas`` these and those elsewhere (``node`` is None here), ``memory_bytes`` what the former hold (other
        models of theirs included), ``engine_pid`` the one that has its queue, ``provenance`` where its answers come
        from (None unless it is loaded). ``counts`` are since the engine's start; a failure is a job answered with a
        5xx.
        """
        self.notice_dead_consumer()
        with self._changed:
            run = self._run if self._run and not self._run.ended else None
            n_waiting = len(self._run.queue) if self._run else 0
            n_accepted = len(self._run.jobs) if self._run else 0
            pids = run.pids() if run else []
            provenance = run.origin.provenance if run and run.origin else None
            return {
                "model": self.name,
                "state": str(self._state),
                "state_seconds": round(time.monotonic() - self._state_since, 3),
                "error": self._error,
                "progress": run.progress() if run and self._state in _STARTING else None,
                "queue_depth": n_waiting + len(self._next_queue),
                "running_jobs": max(0, n_accepted - n_waiting),
                "consumer_type": self.consumer_type,
                "load_seconds": self._load_seconds,
                "device": provenance and provenance["device"],
                "provenance": provenance,
                "memory_bytes": resident_bytes(pids),
                "counts": {
                    "loads": self._n_loads,
                    "failed_loads": self._n_failed_loads,
                    "jobs": self._n_jobs,
                    "items": self._n_items,
                    "failures": self._n_failures,
                },
                "pids": pids,
                "replicas": run.replicas() if run else [],
                "engine_pid": os.getpid(),
            }

    def overview(self) -> dict[str, Any]:
        """Return ``status()`` and what was measured of each task since the engine's start, as ``tasks``.

        ``has_started`` is whether it has been loaded since then, and has not failed since that.
        """
        status = self.status()
        with self._measuring:
            tasks = {task: measured.told() for task, measured in self._measured.items()}
        return status | {"tasks": tasks, "has_started": self._n_loads > 0 and not self._has_failed}

    def require_retry(self) -> None:
        """Raise ``failure()`` if a request must not start the model yet: it has failed to load a moment ago."""
        if self._state is State.FAILED and self._retry_at > time.monotonic():
            raise self.failure()

    def failure(self) -> ModelUnavailable:
        """Return what requests are told of a model that has failed to load."""
        reason = self._error or f"the model {self.name} failed to load"
        return self._failure(reason, retry_after=max(0.0, self._retry_at - time.monotonic()))

    @property
    def state(self) -> State:
        return self._state

    @property
    def is_running(self) -> bool:
        """Whether ``submit`` has nothing to do but to queue a job."""
        with self._changed:
            run = self._run
            # While one that has ended unasked is unloaded, the state still is RUNNING; a moment later it is FAILED.
            return self._state is State.RUNNING and run is not None and not (run.ended or run.has_dead_consumer)

    @property
    def has_dead_consumer(self) -> bool:
        """Whether its consumer died without a word, and nobody has noticed yet."""
        with self._changed:
            return self._run is not None and self._run.has_dead_consumer

    @property
    def is_active(self) -> bool:
        """Whether the model is loaded, is about to be, or is not yet unloaded."""
        return self._state not in (State.STOPPED, State.FAILED)

    def origin_in_use(self) -> Origin | None:
        """Return where the model's answers come from, and take note that it is used; None unless it runs."""
        with self._changed:
            if self._state is not State.RUNNING:
                return None
            self._last_used = time.monotonic()
            return self._current_run().origin

    @property
    def idle_since(self) -> float | None:
        """When the model last had a job, on the clock of ``time.monotonic()``; None unless it runs and has none."""
        with self._changed:
            run = self._run
            idle = self._state is State.RUNNING and run is not None and all(job.ended for job in run.jobs)
            return self._last_used if idle else None

    def join(self, timeout: float) -> None:
        """Wait at most ``timeout`` seconds until the consumer is gone."""
        with self._changed:
            handle = self._run.handle if self._run else None
        if handle is not None:
            handle.join(timeout)

    def notice_dead_consumer(self) -> None:
        """If the consumer died without a word, say so to everybody who waits for it."""
        with self._changed:
            run = self._run
            dead = run is not None and run.has_dead_consumer
        if dead and run is not None:
            run.end("its consumer died")

    # What a run does

    def _begin_loading(self, run: ModelRun) -> bool:
        with self._changed:
            if run is not self._run or run.ended or (self._state is State.STOPPING and not run.jobs):
                return False
            if self._state is State.STARTING:
                self._set_state(State.LOADING)
            return True

    def _load_succeeded(self, run: ModelRun, seconds: float) -> None:
        with self._changed:
            self._last_used = time.monotonic()
            self._load_seconds = round(seconds, 3)
            self._n_loads += 1
            self._n_failed_in_a_row = 0
            self._has_failed = False
            if self._state is State.LOADING:
                self._set_state(State.RUNNING)
        logger.info("The model %s was loaded in %.1f s", self.name, seconds)

    def _load_failed(self, run: ModelRun, failure: ModelUnavailable) -> None:
        with self._changed:
            if run.ended:
                return
            run.ended = True
            if self._state is not State.STOPPING:  # by which a load may have been ended
                self._n_failed_loads += 1
                self._n_failed_in_a_row += 1
            jobs, run_next = self._leave(run, failure.message)
            self._failure = type(failure)
            self._retry_at = time.monotonic() + self.options.load_retry_delay
        fail_all(jobs, failure)
        self._launch(run_next)

    def _next_batch(self, run: ModelRun) -> Batch | None:
        with self._changed:
            while not run.ended:
                if pieces := run.queue.take(self.options.max_batch_size, run.least_items()):
                    run.queue.ask_for_rest(self.options.n_decoded_ahead)
                    return Batch(self.name, run.module, pieces, self._measure, run.origin)
                if all(job.ended for job in run.jobs):
                    if self._state is State.RUNNING and self._idle_seconds_left() <= 0:
                        self._set_state(State.STOPPING)
                    if self._state is State.STOPPING:
                        return None
                # A consumer may run several batches at a time: those of a stopping model are waited for.
                stopping = self._state is State.STOPPING
                self._changed.wait(self.options.result_check_interval if stopping else self._idle_seconds_left())
            return None

    def _measure(self, task: str, n_items: int, waits: list[float], seconds: float) -> None:
        with self._measuring:
            measured = self._measured.get(task) or self._measured.setdefault(task, TaskMeasurements())
            measured.inference_s.add(seconds)
            measured.batch_items.add(n_items)
            for wait in waits:
                measured.queue_s.add(wait)

    def _claim_end(self, run: ModelRun) -> bool:
        """Make sure that only one thread ends a run, the consumer's own or one that noticed its death."""
        with self._changed:
            claimed = not run.ended
            run.ended = True
            if claimed and self._state in _ON_ITS_WAY:
                logger.error("The model %s ends unasked", self.name)
            return claimed

    def _run_ended(self, run: ModelRun, reason: str, retry_after: float | None) -> None:
        message = f"the model {self.name} is not available: {reason}"
        with self._changed:
            while_loading = self._state in _STARTING
            jobs, run_next = self._leave(run, message)
            if while_loading:
                self._n_failed_in_a_row += 1
                self._retry_at = time.monotonic() + self.options.load_retry_delay
        fail_all(jobs, ModelUnavailable(message, retry_after=retry_after))
        self._launch(run_next)

    # Steps that need the lock, which the caller holds

    def _start_locked(self) -> ModelRun | None:
        if self._state in _ON_ITS_WAY:
            return None
        if self._state is State.STOPPING:
            self._restart = True
            return None
        return self._new_run()

    def _new_run(self) -> ModelRun:
        self._run = ModelRun(self, self._next_queue)
        self._next_queue = JobQueue()
        self._restart = False
        self._retry_at = 0.0
        self._failure = ModelLoadFailed
        self._set_state(State.STARTING)
        return self._run

    def _leave(self, run: ModelRun, reason: str) -> tuple[list[Job], ModelRun | None]:
        """Set the state after a run; return the jobs that are left unanswered, and the next run to launch."""
        if run.grace_timer is not None:
            run.grace_timer.cancel()
        jobs = list(run.jobs)
        run.jobs.clear()
        if self._state is State.STOPPING:
            self._set_state(State.STOPPED)
            return jobs, self._new_run() if self._restart else None
        self._has_failed = True
        self._set_state(State.FAILED, reason)
        return jobs, None

    def _queues(self) -> list[JobQueue]:
        return [self._next_queue] if self._run is None else [self._run.queue, self._next_queue]

    def _current_run(self) -> ModelRun:
        assert self._run is not None
        return self._run

    def _idle_seconds_left(self) -> float:
        """Return after how many seconds without a job the model is to stop, at least a moment while it has one."""
        if not self.options.idle_timeout:
            return threading.TIMEOUT_MAX
        if self._run is not None and not all(job.ended for job in self._run.jobs):
            return self.options.idle_timeout
        return self._last_used + self.options.idle_timeout - time.monotonic()

    def _set_state(self, state: State, error: str | None = None) -> None:
        logger.info("The model %s is %s", self.name, state)
        self._state = state
        self._state_since = time.monotonic()
        self._error = error
        self._changed.notify_all()

    def _set_grace_timer(self, run: ModelRun) -> None:
        run.grace_timer = threading.Timer(self.options.stop_grace_period, self._end_grace, [run])
        run.grace_timer.daemon = True
        run.grace_timer.start()

    # Steps that must not hold the lock

    def _launch(self, run: ModelRun | None) -> None:
        if run is None:
            return
        try:
            handle = self._start_consumer(run, self._log_server)
        except BaseException as error:  # a consumer plugin's fault must show as the model's state
            logger.exception("The consumer %s of the model %s failed to start", self.consumer_type, self.name)
            run.end(f"its consumer {self.consumer_type} failed to start: {_describe(error)}")
        else:
            run.handle = handle

    def _end_grace(self, run: ModelRun) -> None:
        with self._changed:
            jobs = list(run.jobs)
            run.jobs.clear()
        fail_all(jobs, ModelUnavailable(f"the model {self.name} was stopped before it had answered"))


def _describe(error: BaseException) -> str:
    return error.message if isinstance(error, ServerError) else f"{type(error).__name__}: {error}"
