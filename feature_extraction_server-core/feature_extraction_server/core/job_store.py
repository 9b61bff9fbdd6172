"""Stored jobs: requests that were accepted to be run later, in an SQLite file that several processes share.

A job is *queued* until a process claims it (*running*), and *succeeded*, *failed* or *cancelled* in the end. Each
process that uses a file holds a lock on it, which its end, however sudden, gives back: by that the others see which
running jobs have lost their process, and queue them again. Every method may be called from any thread.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from feature_extraction_server.core.errors import QueueFull

SCHEMA_VERSION: Final = 2
#: How often a job may lose the process or the model that runs it. Then the job itself counts as the cause.
MAX_CRASHES: Final = 3
CRASH_DELAY_S: Final = 0.5
QUEUE_FULL_RETRY_AFTER_S: Final = 5.0
_LOCK_TIMEOUT_S: Final = 60.0
_MAX_PARAMETERS: Final = 500
_EXPIRE_AT_A_TIME: Final = 500
_FREE_PAGES_AT_A_TIME: Final = 10_000
_MAX_IDLE_JOURNAL_BYTES: Final = 16 << 20

# Inputs have a table of their own, since SQLite writes all of a row anew when any of it changes.
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    task TEXT NOT NULL,
    model TEXT NOT NULL,
    state TEXT NOT NULL,
    n_items INTEGER,
    n_done INTEGER NOT NULL DEFAULT 0,
    crashes INTEGER NOT NULL DEFAULT 0,
    not_before REAL NOT NULL DEFAULT 0,
    owner INTEGER,
    created REAL NOT NULL,
    started REAL,
    ended REAL,
    error TEXT,
    result TEXT,
    meta TEXT
);
CREATE TABLE IF NOT EXISTS inputs (seq INTEGER PRIMARY KEY, input TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, seq, model, crashes, not_before);
CREATE INDEX IF NOT EXISTS jobs_by_end ON jobs (ended) WHERE ended IS NOT NULL;
CREATE TRIGGER IF NOT EXISTS job_ended AFTER UPDATE OF ended ON jobs WHEN NEW.ended IS NOT NULL
    BEGIN DELETE FROM inputs WHERE seq = NEW.seq; END;
CREATE TRIGGER IF NOT EXISTS job_removed AFTER DELETE ON jobs
    BEGIN DELETE FROM inputs WHERE seq = OLD.seq; END;
"""
_COLUMNS: Final = "seq, id, task, model, state, n_items, n_done, crashes, created, started, ended, error"


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class StoredJob:
    """A job as it was when it was looked up. Times are seconds since 1970.

    ``n_items`` is None for a job that is not a batch. ``error`` is what HTTP would have answered. ``result`` and
    ``meta`` (``provenance.meta_of``) are None, too, where they were not asked for. ``queue_position`` counts the queued
    jobs of its model, from 1 on.
    """

    seq: int
    id: str
    task: str
    model: str
    state: JobState
    n_items: int | None
    n_done: int
    crashes: int
    created: float
    started: float | None
    ended: float | None
    error: dict[str, str] | None
    result: Any = None
    meta: dict[str, Any] | None = None
    queue_position: int | None = None

    @property
    def has_ended(self) -> bool:
        return self.ended is not None


class JobStore:
    """The jobs of one file.

    Args:
        path: the file, which is made where there is none; None keeps the jobs in memory, for this process alone.
        ttl_s: how long a job that has ended is kept.

    Raises:
        OSError, sqlite3.Error: the file cannot be used.
    """

    def __init__(self, path: Path | None, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._lock = threading.RLock()
        self._lifeline = None if path is None else _Lifeline(path)
        self.owner: Final = 1 if self._lifeline is None else self._lifeline.number
        # What is locked by another process is waited for.
        self._database = sqlite3.connect(
            ":memory:" if path is None else path,
            timeout=_LOCK_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            self._set_up()
        except BaseException:
            self.close()
            raise

    def _set_up(self) -> None:
        self._database.execute("PRAGMA auto_vacuum = INCREMENTAL")  # counts for a file that is new
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute(f"PRAGMA journal_size_limit = {_MAX_IDLE_JOURNAL_BYTES}")
        # A commit survives the end of all processes; the last ones may be lost when the machine itself goes down.
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._execute("BEGIN IMMEDIATE")  # one process at a time
        ((version,),) = self._execute("PRAGMA user_version")
        if version not in (0, 1, SCHEMA_VERSION):
            raise sqlite3.DatabaseError(f"it was written by another release (version {version})")
        if version == 1:
            self._execute("ALTER TABLE jobs ADD COLUMN meta TEXT")
            self._execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        self._execute("COMMIT")
        self._database.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")

    def close(self) -> None:
        """Give the file back. Jobs that this process still runs are then queued again by another one."""
        with self._lock:
            self._database.close()
            if self._lifeline is not None:
                self._lifeline.close()

    # What clients ask for

    def add(self, task: str, model: str, n_items: int | None, payload: str, max_queued: int) -> StoredJob:
        """Queue a job with the JSON text of its input.

        Raises:
            QueueFull: ``max_queued`` jobs wait already.
        """
        id, now = secrets.token_hex(16), time.time()
        with self._lock:
            self._execute("BEGIN IMMEDIATE")
            try:
                ((n_queued,),) = self._execute("SELECT count(*) FROM jobs WHERE state = 'queued'")
                if n_queued >= max_queued:
                    raise QueueFull(
                        f"{n_queued} jobs wait already (MAX_QUEUED_JOBS)", retry_after=QUEUE_FULL_RETRY_AFTER_S
                    )
                ((seq,),) = self._execute(
                    "INSERT INTO jobs (id, task, model, state, n_items, created) VALUES (?, ?, ?, 'queued', ?, ?)"
                    " RETURNING seq",
                    (id, task, model, n_items, now),
                )
                self._execute("INSERT INTO inputs VALUES (?, ?)", (seq, payload))
                job = self._get(id)
                self._execute("COMMIT")
            except BaseException:
                self._database.rollback()
                raise
        assert job is not None
        return job

    def get(self, id: str) -> StoredJob | None:
        """Look a job up; None where there is none, or it has expired."""
        return self._get(id, "result, meta")

    def _get(self, id: str, result: str = "NULL, NULL") -> StoredJob | None:
        position = (
            "CASE state WHEN 'queued' THEN (SELECT count(*) FROM jobs AS other WHERE other.state = 'queued'"
            " AND other.model = jobs.model AND other.seq <= jobs.seq) END"
        )
        rows = self._execute(
            f"SELECT {_COLUMNS}, {result}, {position} FROM jobs WHERE id = ? AND (ended IS NULL OR ended > ?)",
            (id, self._oldest()),
        )
        return _job(rows[0]) if rows else None

    def latest(self, limit: int, state: str | None = None) -> list[StoredJob]:
        """Return jobs without their results, the newest first."""
        # All positions are numbered once and then looked up: for a join, SQLite makes no index, and it is quadratic.
        rows = self._execute(
            "WITH positions AS MATERIALIZED (SELECT seq AS queued, row_number() OVER (PARTITION BY model ORDER BY seq)"
            " AS position FROM jobs WHERE state = 'queued')"
            f" SELECT {_COLUMNS}, NULL, NULL, (SELECT position FROM positions WHERE queued = jobs.seq) FROM jobs"
            " WHERE (ended IS NULL OR ended > ?) AND (?2 IS NULL OR state = ?2) ORDER BY seq DESC LIMIT ?3",
            (self._oldest(), state, limit),
        )
        return [_job(row) for row in rows]

    def cancel(self, id: str) -> bool:
        """Cancel a job; tell whether there was one that had not ended. What a running one still gives is dropped."""
        return bool(
            self._execute(
                "UPDATE jobs SET state = 'cancelled', ended = ? WHERE id = ? AND ended IS NULL RETURNING seq",
                (time.time(), id),
            )
        )

    def remove(self, id: str) -> None:
        """Forget a job that has ended."""
        self._execute("DELETE FROM jobs WHERE id = ? AND ended IS NOT NULL", (id,))

    # What those who run the jobs ask for

    def claim(self, busy_models: Collection[str]) -> StoredJob | None:
        """Take the job that has waited longest, but none of some models; it is then this process's to run.

        Of the jobs that have crashed before, one runs at a time: what crashes along with another is innocent then.
        """
        if not self._execute("SELECT 1 FROM jobs WHERE state = 'queued' LIMIT 1"):
            return None  # found without keeping other processes from writing
        busy = ", ".join("?" * len(busy_models))
        now = time.time()
        rows = self._execute(
            "UPDATE jobs SET state = 'running', owner = ?, started = ?, n_done = 0 WHERE seq = ("
            " SELECT seq FROM jobs WHERE state = 'queued' AND (not_before <= ? OR not_before > ?)"
            f" AND model NOT IN ({busy})"
            " AND (crashes = 0 OR NOT EXISTS (SELECT 1 FROM jobs WHERE state = 'running' AND crashes > 0))"
            f" ORDER BY seq LIMIT 1) RETURNING {_COLUMNS}",
            # None is put off for longer, but where the clock was wrong.
            (self.owner, now, now, now + MAX_CRASHES * CRASH_DELAY_S, *busy_models),
        )
        return _job(rows[0]) if rows else None

    def payload(self, job: StoredJob) -> dict[str, Any] | None:
        """Return a job's input; None where it has ended meanwhile."""
        rows = self._execute("SELECT input FROM inputs WHERE seq = ?", (job.seq,))
        payload: dict[str, Any] | None = json.loads(rows[0][0]) if rows else None
        return payload

    def tell_progress(self, job: StoredJob, n_done: int) -> None:
        """Note how many of a job's items are done."""
        self._execute("UPDATE jobs SET n_done = ? WHERE seq = ? AND owner = ?", (n_done, job.seq, self.owner))

    def succeed(self, job: StoredJob, result: str, meta: str) -> None:
        """Keep a job's result and meta, as JSON texts; this process runs it. Nothing is kept if it was cancelled."""
        self._execute(
            "UPDATE jobs SET state = 'succeeded', ended = ?, result = ?, meta = ?, n_done = coalesce(n_items, 1)"
            " WHERE seq = ? AND owner = ? AND state = 'running'",
            (time.time(), result, meta, job.seq, self.owner),
        )

    def fail(self, job: StoredJob, error: dict[str, str]) -> None:
        """Keep why a job that this process runs has failed, unless it was cancelled."""
        self._execute(
            "UPDATE jobs SET state = 'failed', ended = ?, error = ? WHERE seq = ? AND owner = ? AND state = 'running'",
            (time.time(), json.dumps(error), job.seq, self.owner),
        )

    def crash(self, job: StoredJob, error: dict[str, str]) -> None:
        """Queue a job of this process's again, since what ran it has died; the last time, fail it."""
        self._crash([job.seq], self.owner, error)

    def give_back(self, jobs: Iterable[StoredJob]) -> None:
        """Queue jobs of this process's again, which then count as never begun."""
        for job in jobs:
            self._execute(
                "UPDATE jobs SET state = 'queued', owner = NULL, started = NULL, n_done = 0"
                " WHERE seq = ? AND owner = ? AND state = 'running'",
                (job.seq, self.owner),
            )

    def ended_of(self, ids: Iterable[str]) -> set[str]:
        """Return which of these jobs have ended, or are no longer there."""
        waiting, going = set(ids), set[str]()
        for some in _chunks(list(waiting)):
            marks = ", ".join("?" * len(some))
            rows = self._execute(f"SELECT id FROM jobs WHERE ended IS NULL AND id IN ({marks})", some)
            going |= {id for (id,) in rows}
        return waiting - going

    def data_version(self) -> int:
        """Return a number that changes when another process has changed anything."""
        ((version,),) = self._execute("PRAGMA data_version")
        return int(version)

    def recover(self, error: dict[str, str]) -> None:
        """Queue the jobs again whose processes have died; fail, with an error, those that crash each time."""
        if self._lifeline is None:
            return
        rows = self._execute("SELECT DISTINCT owner FROM jobs WHERE state = 'running' AND owner <> ?", (self.owner,))
        for (owner,) in rows:
            if not self._lifeline.is_held(owner):
                lost = self._execute("SELECT seq FROM jobs WHERE state = 'running' AND owner = ?", (owner,))
                self._crash([seq for (seq,) in lost], owner, error)

    def expire(self) -> None:
        """Forget the jobs that ended too long ago, and give back the room that they took."""
        statement = "DELETE FROM jobs WHERE seq IN (SELECT seq FROM jobs WHERE ended <= ? LIMIT ?) RETURNING seq"
        # A few at a time, since nobody else can write meanwhile.
        while len(self._execute(statement, (self._oldest(), _EXPIRE_AT_A_TIME))) == _EXPIRE_AT_A_TIME:
            pass
        self._execute(f"PRAGMA incremental_vacuum({_FREE_PAGES_AT_A_TIME})")

    def _crash(self, seqs: Iterable[int], owner: int, error: dict[str, str]) -> None:
        now = time.time()
        for seq in seqs:  # each only if it is still this owner's: another process may have been faster
            self._execute(
                "UPDATE jobs SET crashes = crashes + 1, owner = NULL, n_done = 0,"
                " state = iif(crashes + 1 < ?1, 'queued', 'failed'),"
                " not_before = ?2 + ?3 * (crashes + 1),"
                " error = iif(crashes + 1 < ?1, NULL, ?4),"
                " ended = iif(crashes + 1 < ?1, NULL, ?2)"
                " WHERE seq = ?5 AND owner = ?6 AND state = 'running'",
                (MAX_CRASHES, now, CRASH_DELAY_S, json.dumps(error), seq, owner),
            )

    def _oldest(self) -> float:
        return time.time() - self._ttl_s

    def _execute(self, statement: str, parameters: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            return self._database.execute(statement, parameters).fetchall()


class _Lifeline:
    """Tells whether the processes that use a file live: each holds a lock on a byte, of a random number, beside it."""

    def __init__(self, path: Path) -> None:
        # What clients sent is for nobody else's eyes. SQLite gives its other files the same mode.
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        # Not on SQLite's file: whoever closes a file loses all locks that he has on it.
        owners = os.open(path.with_name(path.name + "-owners"), os.O_RDWR | os.O_CREAT, 0o600)
        self._file = os.fdopen(owners, "r+b", buffering=0)
        self.number: Final = secrets.randbelow(1 << 62) + 1
        fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self.number)

    def is_held(self, number: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, number)
        except OSError:
            return True
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)
        return False

    def close(self) -> None:
        self._file.close()


def _job(row: Sequence[Any]) -> StoredJob:
    """Make a job of the columns ``_COLUMNS`` and, where they were asked for, its result, its meta and its position."""
    seq, id, task, model, state, n_items, n_done, crashes, created, started, ended, error = row[:12]
    result, meta, position = row[12:] or (None, None, None)
    times = created, started, ended
    return StoredJob(
        seq,
        id,
        task,
        model,
        JobState(state),
        n_items,
        n_done,
        crashes,
        *times,
        _from_json(error),
        _from_json(result),
        _from_json(meta),
        position,
    )


def _from_json(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _chunks(values: Sequence[str]) -> Iterable[Sequence[str]]:
    return (values[i : i + _MAX_PARAMETERS] for i in range(0, len(values), _MAX_PARAMETERS))
