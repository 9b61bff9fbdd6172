"""Running stored jobs: every process that answers requests runs some of them, on threads of its own.

A thread runs one job after another as long as some wait. One more thread, the *lookout*, sees to what other processes
do: jobs that they queued, ended or cancelled, and jobs that they left behind when they died.
"""

from __future__ import annotations

import atexit
import base64
import json
import logging
import os
import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from feature_extraction_server.core.errors import (
    ClientDisconnected,
    DeadlineExceeded,
    InvalidInput,
    ModelLoadFailed,
    ModelUnavailable,
    NotFound,
    QueueFull,
    ServerError,
    SettingError,
)
from feature_extraction_server.core.job_store import MAX_CRASHES, JobState, JobStore, StoredJob
from feature_extraction_server.core.provenance import meta_of
from feature_extraction_server.core.settings import Setting, SettingsManager
from feature_extraction_server.core.to_json import to_json
from feature_extraction_server.core.tracking import Origin, RequestRecord, current
from feature_extraction_server.core.turns import waiting

if TYPE_CHECKING:
    from feature_extraction_server.core.application import ApplicationInterface

logger = logging.getLogger(__name__)

#: How often the lookout looks: what another process queued or cancelled waits for as long at most.
LOOK_INTERVAL_S: Final = 0.5
#: The same while a client here waits for the end of a job that another process may run.
WATCH_INTERVAL_S: Final = 0.02
RECOVERY_INTERVAL_S: Final = 0.5
EXPIRY_INTERVAL_S: Final = 10.0
#: One batch that the model works on, and one that is being decoded meanwhile.
BATCHES_AT_A_TIME: Final = 2
MAX_RETRY_DELAY_S: Final = 5.0
STORE_RETRY_DELAY_S: Final = 2.0
CLOSE_TIMEOUT_S: Final = 5.0
_LOST: Final = ModelUnavailable(f"each of the {MAX_CRASHES} times that the job was begun, the server ended")


class JobSettings:
    """The settings of stored jobs, which every api plugin that works with jobs declares."""

    def __init__(self, settings_manager: SettingsManager) -> None:
        add = settings_manager.add_setting
        self.path: Setting[str] = add(
            name="JOBS_PATH",
            type=str,
            default=None,
            description="The file (SQLite) that keeps jobs, so that they survive the server's end; "
            "without one, they end with the server",
        )
        self.ttl: Setting[float] = add(
            name="JOB_TTL",
            type=float,
            default=3600.0,
            minimum=0.001,
            maximum=1e8,
            description="Seconds that a job is kept after its end",
        )
        self.timeout: Setting[float] = add(
            name="JOB_TIMEOUT",
            type=float,
            default=86400.0,
            minimum=0.001,
            maximum=1e8,
            description="Seconds that a job may run, loading included",
        )
        self.max_queued: Setting[int] = add(
            name="MAX_QUEUED_JOBS",
            type=int,
            default=10_000,
            minimum=1,
            description="Jobs that may be queued; more are refused",
        )
        settings_manager.add_check(self._check_path)

    def _check_path(self) -> None:
        if self.path.get() is None:
            return
        try:
            JobStore(Path(self.path.get()), self.ttl.get()).close()
        except (OSError, sqlite3.Error) as error:
            raise SettingError(
                f"JOBS_PATH={self.path.get()!r} is not allowed: it must be a file of jobs, or one that can be made "
                f"({error})"
            ) from None


@dataclass(eq=False)
class _Run:
    """A job that this process runs."""

    store: JobStore
    job: StoredJob
    give_up_at: float
    payload: dict[str, Any] | None  # None: it is to be read
    given_up: threading.Event = field(default_factory=threading.Event)


class _Answer(NamedTuple):
    """What a piece of a job has given."""

    results: list[Any]
    origin: Origin | None

    @property
    def provenance(self) -> dict[str, str | None] | None:
        return None if self.origin is None else self.origin.provenance


class JobRunner:
    """Takes jobs and runs them. Every method may be called from any thread.

    Nothing is opened and no thread started before ``start``, or the first use, in each process.
    """

    def __init__(self, application: ApplicationInterface, settings: JobSettings) -> None:
        self._application = application
        self._settings = settings
        directory = application.shared_directory
        given = settings.path.get()
        self._path = Path(given).resolve() if given else directory and directory / "jobs.sqlite3"
        self._starting = threading.Lock()
        self._store: JobStore | None = None
        self._pid = 0
        self._changed = threading.Condition()
        self._runs: set[_Run] = set()
        self._waiting: dict[str, list[threading.Event]] = {}
        self._look = threading.Event()
        self._closing = threading.Event()
        if self._path is not None:
            # Jobs that were left behind must run though nobody asks for anything.
            application.in_each_worker(self._start_lookout)

    # What clients ask for

    def submit(self, task: str, model: str | None, payload: dict[str, Any]) -> StoredJob:
        """Accept a job, and return it at once.

        Raises:
            ServerError: what can be told without running it: TaskNotFound, ModelNotFound, TaskNotSupported, NoDefault,
                InvalidInput, TooLarge; QueueFull where too many jobs are queued.
        """
        task, model, n_items = self._application.check(task, model, payload)
        text = json.dumps(payload, default=_as_base64)
        try:
            job = self._opened().add(task, model, n_items, text, self._settings.max_queued.get())
        except sqlite3.Error as error:
            raise _unusable(error) from error
        self._set_to_work({job.id: payload})
        return job

    def get(self, id: str, wait_s: float = 0) -> StoredJob:
        """Return a job with its result, at once or, if it has not ended, when it does or the time is up.

        Raises:
            NotFound: there is no such job, or it has expired.
        """
        give_up_at = time.monotonic() + wait_s
        job = self._find(id)
        if job.has_ended or wait_s <= 0:
            return job
        with self._told_of_end(id) as ended:
            while True:
                with suppress(sqlite3.ProgrammingError):  # at this process's end, the store may be closed by now
                    job = self._find(id)
                remaining = give_up_at - time.monotonic()
                # At this process's end, another one runs it, and tells who asks again.
                if job.has_ended or remaining <= 0 or self._closing.is_set():
                    return job
                with waiting():
                    ended.wait(remaining)
                ended.clear()

    def latest(self, limit: int, state: JobState | None = None) -> list[StoredJob]:
        """Return jobs without their results, the newest first."""
        return self._opened().latest(limit, state)

    def cancel(self, id: str) -> StoredJob | None:
        """Cancel a job and return it; one that has ended is removed, with its result.

        Raises:
            NotFound: there is no such job, or it has expired.
        """
        self._find(id)
        if not self._opened().cancel(id):
            self._opened().remove(id)
            return None
        self._tell_end([id])
        return self._find(id)

    def _find(self, id: str) -> StoredJob:
        job = self._opened().get(id)
        if job is None:
            raise NotFound(f"there is no job {id[:80]!r}, or it has expired (JOB_TTL)")
        return job

    @contextmanager
    def _told_of_end(self, id: str) -> Iterator[threading.Event]:
        """Give an event that is set when a job may have ended."""
        event = threading.Event()
        with self._changed:
            self._waiting.setdefault(id, []).append(event)
            runs_here = any(run.job.id == id for run in self._runs)
        if not runs_here:
            self._look.set()  # from now on, it looks more often
        try:
            yield event
        finally:
            with self._changed:
                self._waiting[id].remove(event)
                if not self._waiting[id]:
                    del self._waiting[id]

    def _tell_end(self, ids: Iterable[str]) -> None:
        """Wake who waits for jobs, and whoever still runs one of them."""
        with self._changed:
            ended = set(ids)
            for run in self._runs:
                if run.job.id in ended:
                    run.given_up.set()
            self._wake(ended)

    def _wake(self, ids: Iterable[str]) -> None:
        """Wake who waits for jobs. The caller holds the lock."""
        for id in ids:
            for event in self._waiting.get(id, ()):
                event.set()

    # Begin and end

    def start(self) -> None:
        """Open the store in this process and begin to run jobs, if it has not been done.

        Raises:
            ServerError: the store cannot be opened.
        """
        self._opened()

    def stop_running(self) -> None:
        """Run no more jobs in this process. Those that are not done are queued again, and who waits is answered."""
        # A forked child has a copy of its parent's object, but none of its jobs.
        if self._store is None or self._pid != os.getpid():
            return
        self._closing.set()
        self._look.set()
        with self._changed:
            runs = list(self._runs)
            for run in runs:
                run.given_up.set()
            self._changed.wait_for(lambda: not self._runs, CLOSE_TIMEOUT_S)
        try:
            self._store.give_back([run.job for run in runs])
        except sqlite3.Error as error:  # the lock that goes with the process tells others all the same
            logger.warning("Jobs that this process ran were not given back: %s", error)
        with self._changed:
            self._wake(self._waiting)

    def close(self) -> None:
        """Stop running jobs in this process, and close the store."""
        if self._store is None or self._pid != os.getpid():
            return
        self.stop_running()
        atexit.unregister(self.close)
        with suppress(sqlite3.Error):
            self._store.close()

    def _opened(self) -> JobStore:
        if self._store is not None:
            return self._store
        with self._starting:
            if self._store is None:
                try:
                    self._store = JobStore(self._path, self._settings.ttl.get())
                except (OSError, sqlite3.Error) as error:
                    raise _unusable(error) from error
                self._pid = os.getpid()
                atexit.register(self.close)
                threading.Thread(target=self._look_out, args=(self._store,), name="jobs-lookout", daemon=True).start()
            return self._store

    def _start_lookout(self) -> None:
        threading.Thread(target=self._start_at_last, name="jobs-start", daemon=True).start()

    def _start_at_last(self) -> None:
        while self._store is None:
            try:
                self.start()
            except ServerError:
                logger.exception("Stored jobs cannot be run yet")
                time.sleep(STORE_RETRY_DELAY_S)

    # The lookout

    def _look_out(self, store: JobStore) -> None:
        version, recover_at, expire_at = -1, 0.0, 0.0
        while not self._closing.is_set():
            try:
                now = time.monotonic()
                if now >= recover_at:
                    recover_at = now + RECOVERY_INTERVAL_S
                    store.recover(_LOST.body())
                    self._set_to_work()  # delayed jobs, too
                if now >= expire_at:
                    expire_at = now + EXPIRY_INTERVAL_S
                    store.expire()
                if (found := store.data_version()) != version:
                    version = found
                    self._set_to_work()
                    self._tell_end(store.ended_of(self._known()))
            except Exception:
                if not self._closing.is_set():
                    logger.exception("The stored jobs cannot be looked after")
                    self._closing.wait(STORE_RETRY_DELAY_S)
            self._look.wait(WATCH_INTERVAL_S if self._waits_for_others() else LOOK_INTERVAL_S)
            self._look.clear()

    def _known(self) -> set[str]:
        """Return the jobs that somebody waits for here, and those that run here."""
        with self._changed:
            return self._waiting.keys() | {run.job.id for run in self._runs}

    def _waits_for_others(self) -> bool:
        with self._changed:
            return bool(self._waiting) and not self._waiting.keys() <= {run.job.id for run in self._runs}

    # Running

    def _set_to_work(self, payloads: Mapping[str, dict[str, Any]] = MappingProxyType({})) -> None:
        """Start a thread for each queued job that may run here now; those of ``payloads`` need not be read again."""
        while (run := self._claim(payloads)) is not None:
            try:
                threading.Thread(target=self._work, args=(run,), name=f"job-{run.job.id}", daemon=True).start()
            except RuntimeError:  # the system has none left: the lookout tries again
                try:
                    self._save(partial(run.store.give_back, [run.job]))
                finally:
                    self._end(run)
                return

    def _claim(self, payloads: Mapping[str, dict[str, Any]] = MappingProxyType({})) -> _Run | None:
        with self._changed:
            if self._store is None or self._closing.is_set() or self._application.is_ending:
                return None
            n_running = Counter(run.job.model for run in self._runs)
            busy = [model for model, n in n_running.items() if n >= BATCHES_AT_A_TIME * self._batch_size(model)]
            try:
                job = self._store.claim(busy)
            except sqlite3.Error:
                logger.exception("No stored job can be taken")
                return None
            if job is None:
                return None
            give_up_at = time.monotonic() + self._settings.timeout.get()
            run = _Run(self._store, job, give_up_at, payloads.get(job.id))
            self._runs.add(run)
            return run

    def _batch_size(self, model: str) -> int:
        if model not in self._application.registry.models:
            return 1  # the job is to fail
        return self._application.settings.model_options(model).max_batch_size

    def _work(self, first: _Run) -> None:
        run: _Run | None = first
        while run is not None:
            record = _new_record(run.job)
            current.set(record)  # so that what is logged of it can be found
            try:
                self._save(self._outcome(run, record))
            except Exception:  # a result that is larger than the store takes, say
                if not self._closing.is_set():  # otherwise, the store is closed, and the job has been given back
                    logger.exception("What came of the job %s cannot be stored", run.job.id)
                    self._try_to_fail(run)
            finally:
                self._end(run)
            run = self._claim()

    def _try_to_fail(self, run: _Run) -> None:
        error = ServerError("the server could not store what came of this job; its log says why")
        try:
            self._save(partial(run.store.fail, run.job, error.body()))
        except Exception:
            logger.exception("What came of the job %s is lost", run.job.id)

    def _end(self, run: _Run) -> None:
        with self._changed:
            self._runs.discard(run)
            # Nobody who runs it: it may have been queued again, and be another run's by now.
            self._wake([run.job.id])
            self._changed.notify_all()

    def _outcome(self, run: _Run, record: RequestRecord) -> Callable[[], None] | None:
        """Run a job, whose record is this thread's current one, and return what writes down what came of it."""
        store, job = run.store, run.job
        try:
            payload = store.payload(job) if run.payload is None else run.payload
            if payload is None:
                return None  # cancelled meanwhile
            result = to_json(self._result(run, payload, record)).decode()
            return partial(store.succeed, job, result, json.dumps(meta_of(self._application, record)))
        except ClientDisconnected:
            return partial(store.give_back, [job])  # this process ends; one that was cancelled is not its any more
        except ModelLoadFailed as error:
            return partial(store.fail, job, error.body())
        except ModelUnavailable as error:
            if self._application.is_ending:
                return partial(store.give_back, [job])  # not its fault: it waits for the server's next start
            logger.warning("The job %s has lost its model: %s", job.id, error.message)
            return partial(store.crash, job, error.body())
        except ServerError as error:
            return partial(store.fail, job, error.body())
        except BaseException:  # SystemExit too: it would end this thread, and nobody would run the job
            logger.exception("The server failed on the job %s", job.id)
            return partial(store.fail, job, ServerError("the server failed on this job; its log says why").body())

    def _save(self, write: Callable[[], None] | None) -> None:
        """Write to the store, as soon as it can be written to: the disk may be full."""
        while write is not None:
            try:
                write()
                write = None
            except sqlite3.OperationalError:
                logger.exception("What came of a job cannot be stored yet")
                if self._closing.wait(STORE_RETRY_DELAY_S):
                    write = None

    def _result(self, run: _Run, payload: dict[str, Any], record: RequestRecord) -> Any:
        """Run a job: in one piece or, one larger than a batch, in several, so that it shows its progress.

        The record then tells the times of all pieces, and the one origin that they have.
        """
        job, size = run.job, self._batch_size(run.job.model)
        spec = self._application.registry.spec(job.task) if job.task in self._application.registry.tasks else None
        if spec is None or job.n_items is None or job.n_items <= size:
            return self._ask(run, payload)
        starts: Sequence[int] = range(0, job.n_items, size)
        answers: dict[int, _Answer] = {}  # by where their pieces start; the latest one is the last
        errors: dict[int, BaseException] = {}

        def run_pieces(starts: Iterator[int], record: RequestRecord) -> None:
            current.set(record)
            for start in starts:
                try:
                    results = self._ask(run, _piece(payload, spec.batch_fields, start, size))
                except BaseException as error:  # raised again below
                    errors[start] = _moved(error, spec.batch_fields, start)
                if errors:
                    return
                with self._changed, suppress(sqlite3.Error):
                    answers[start] = _Answer(results, record.answer_origin)
                    run.store.tell_progress(job, sum(len(answer.results) for answer in answers.values()))

        while starts:
            # Two threads share them: one piece is decoded while the model has the other.
            todo, helpers_record = iter(starts), _new_record(job)
            helper = threading.Thread(target=run_pieces, args=(todo, helpers_record), name=f"job-{job.id}", daemon=True)
            helper.start()
            run_pieces(todo, record)
            helper.join()
            if errors:
                raise errors[min(errors)]
            if helpers_record.times is not None:
                record.add(helpers_record.times)
            starts = _take_outdated(answers)
        record.answer_origin = answers[0].origin
        return [result for start in sorted(answers) for result in answers[start].results]

    def _ask(self, run: _Run, payload: dict[str, Any]) -> Any:
        """Run the job's task, again and again while the model has no room."""
        too_late = DeadlineExceeded(f"the job did not end within {self._settings.timeout.get():g} s (JOB_TIMEOUT)")
        while (remaining := run.give_up_at - time.monotonic()) > 0:
            try:
                return self._application.run(
                    run.job.task,
                    run.job.model,
                    payload,
                    is_wanted=lambda: not run.given_up.is_set(),
                    timeout_s=remaining,
                )
            except DeadlineExceeded:
                raise too_late from None
            except (QueueFull, ModelUnavailable) as error:
                if error.retry_after is None or isinstance(error, ModelLoadFailed):
                    raise
                if run.given_up.wait(min(error.retry_after, MAX_RETRY_DELAY_S, remaining)):
                    raise ClientDisconnected("the job was cancelled") from None
        raise too_late


def jobs_of(application: ApplicationInterface, settings: JobSettings) -> JobRunner:
    """Return the job runner of an application: one for all its api plugins."""
    if application.jobs is None:
        application.jobs = JobRunner(application, settings)
    return application.jobs


def _new_record(job: StoredJob) -> RequestRecord:
    """Return a record for a thread that works on a job."""
    record = RequestRecord(job.id)
    record.task, record.model, record.wants_origin = job.task, job.model, True
    return record


def _take_outdated(answers: dict[int, _Answer]) -> list[int]:
    """Take out the answers of other weights than those of the latest one, and return where their pieces start.

    The model was started anew meanwhile: vectors of two models must not share a result.
    """
    latest = next(reversed(answers.values())).provenance
    outdated = [start for start, answer in answers.items() if answer.provenance != latest]
    for start in outdated:
        del answers[start]
    return outdated


def _piece(payload: dict[str, Any], batch_fields: Collection[str], start: int, size: int) -> dict[str, Any]:
    return {
        key: value[start : start + size] if key in batch_fields and isinstance(value, list) else value
        for key, value in payload.items()
    }


def _moved(error: BaseException, batch_fields: Collection[str], start: int) -> BaseException:
    """Return an error in a piece as one in the whole: it names the item by its place in the whole list."""
    if not isinstance(error, InvalidInput) or not (match := re.fullmatch(r"(\w+)\[(\d+)\]", error.field or "")):
        return error
    key, index = match[1], int(match[2])
    if key not in batch_fields:
        return error
    field = f"{key}[{start + index}]"
    return type(error)(error.message.replace(match[0], field), field=field, retry_after=error.retry_after)


def _as_base64(value: Any) -> str:
    """Write bytes, which JSON has not, as every field for media takes them."""
    return base64.b64encode(value).decode()


def _unusable(error: Exception) -> ServerError:
    return ServerError(f"the stored jobs cannot be read or written: {error}")
