"""The store of jobs: who gets which job, and what becomes of it when its process dies."""

from __future__ import annotations

import json
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from feature_extraction_server.core.errors import QueueFull
from feature_extraction_server.core.job_store import MAX_CRASHES, JobState, JobStore, StoredJob
from tests.waiting import at_once

ERROR = {"error": "it died", "code": "model_unavailable"}
NOBODY = 4711  # the number of no process
MakeStore = Callable[..., JobStore]


@pytest.fixture
def make_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeStore]:
    """``make_store(ttl_s=...)`` opens a store of the test's file; what crashed need not wait there."""
    monkeypatch.setattr("feature_extraction_server.core.job_store.CRASH_DELAY_S", 0)
    stores: list[JobStore] = []

    def make(ttl_s: float = 60) -> JobStore:
        stores.append(JobStore(tmp_path / "jobs.sqlite3", ttl_s))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def store(make_store: MakeStore) -> JobStore:
    return make_store()


def add(store: JobStore, model: str = "model", payload: str = "{}") -> StoredJob:
    return store.add("task", model, None, payload, max_queued=1000)


def claimed(store: JobStore) -> StoredJob:
    job = store.claim([])
    assert job is not None
    return job


def state_of(store: JobStore, job: StoredJob) -> JobState:
    found = store.get(job.id)
    assert found is not None
    return found.state


def sql(path: Path, statement: str) -> list[tuple[object, ...]]:
    """Run a statement on the file as another process would."""
    database = sqlite3.connect(path)
    try:
        with database:
            return database.execute(statement).fetchall()
    finally:
        database.close()


def test_jobs_are_claimed_in_the_order_in_which_they_came(store: JobStore) -> None:
    added = [add(store).id for _ in range(3)]

    assert [claimed(store).id for _ in added] == added
    assert store.claim([]) is None


def test_jobs_of_a_busy_model_wait_while_those_of_others_are_claimed(store: JobStore) -> None:
    add(store, "busy")
    other = add(store, "other")

    assert [job and job.id for job in (store.claim(["busy"]), store.claim(["busy"]))] == [other.id, None]


def test_a_job_is_claimed_by_one_process_only(make_store: MakeStore) -> None:
    stores = [make_store() for _ in range(4)]
    added = {add(stores[0]).id for _ in range(40)}

    claims = at_once(4, lambda n: [claimed(stores[n]).id for _ in range(10)])

    assert sorted(id for some in claims for id in some) == sorted(added)


def test_position_counts_the_queued_jobs_of_the_same_model(store: JobStore) -> None:
    jobs = [add(store), add(store, "other"), add(store)]

    positions = [found.queue_position for job in jobs if (found := store.get(job.id))]

    assert positions == [1, 1, 2]


def test_list_of_jobs_tells_the_same_positions(store: JobStore) -> None:
    running, ended = add(store), add(store, "other")
    claimed(store)
    store.succeed(claimed(store), "1", "{}")
    queued = [add(store), add(store, "other"), add(store)]

    positions = {job.id: job.queue_position for job in store.latest(10)}

    first, other, second = (job.id for job in queued)
    assert positions == {running.id: None, ended.id: None, first: 1, other: 1, second: 2}
    assert [job.queue_position for job in store.latest(1, "queued")] == [2]


def test_input_is_dropped_when_the_job_ends(store: JobStore, tmp_path: Path) -> None:
    jobs = [add(store, payload='{"text": "secret"}') for _ in range(4)]
    first = claimed(store)
    assert store.payload(first) == {"text": "secret"}

    store.succeed(first, "1", "{}")
    store.fail(claimed(store), ERROR)
    store.cancel(jobs[2].id)

    assert sql(tmp_path / "jobs.sqlite3", "SELECT count(*) FROM inputs") == [(1,)]


def test_result_that_comes_after_the_cancellation_is_dropped(store: JobStore) -> None:
    job = add(store)
    running = claimed(store)

    assert store.cancel(job.id)
    store.succeed(running, '"late"', "{}")

    found = store.get(job.id)
    assert found is not None
    assert (found.state, found.result) == (JobState.CANCELLED, None)
    assert not store.cancel(job.id)


def test_a_full_queue_is_told_with_when_to_come_again(store: JobStore) -> None:
    add(store)

    with pytest.raises(QueueFull, match="MAX_QUEUED_JOBS") as caught:
        store.add("task", "model", None, "{}", max_queued=1)

    assert caught.value.retry_after


def test_jobs_of_a_dead_process_are_queued_again_and_those_of_a_living_one_are_not(
    store: JobStore, tmp_path: Path
) -> None:
    lost, kept = add(store), add(store)
    claimed(store)
    claimed(store)
    sql(tmp_path / "jobs.sqlite3", f"UPDATE jobs SET owner = {NOBODY} WHERE id = '{lost.id}'")

    store.recover(ERROR)

    assert (state_of(store, lost), state_of(store, kept)) == (JobState.QUEUED, JobState.RUNNING)


def test_a_job_that_crashes_each_time_fails_in_the_end(store: JobStore) -> None:
    job = add(store)

    for _ in range(MAX_CRASHES):
        assert state_of(store, job) is JobState.QUEUED
        store.crash(claimed(store), ERROR)

    found = store.get(job.id)
    assert found is not None
    assert (found.state, found.error) == (JobState.FAILED, ERROR)


def test_a_job_that_crashed_while_the_clock_was_wrong_need_not_wait_for_that_time(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(ttl_s=1e9)
    monkeypatch.setattr("feature_extraction_server.core.job_store.CRASH_DELAY_S", 0.5)
    now = time.time()
    add(store)
    job = claimed(store)
    monkeypatch.setattr(time, "time", lambda: now + 1e6)
    store.crash(job, ERROR)
    soon = store.claim([])
    monkeypatch.setattr(time, "time", lambda: now)

    assert soon is None
    assert claimed(store).id == job.id


def test_jobs_that_crashed_run_one_at_a_time_beside_others(store: JobStore) -> None:
    crashed = [add(store), add(store)]
    for job in [claimed(store), claimed(store)]:
        store.crash(job, ERROR)
    fresh = add(store)

    first, second = claimed(store), claimed(store)

    assert [first.id, second.id] == [crashed[0].id, fresh.id]
    assert store.claim([]) is None
    store.succeed(first, "1", "{}")
    assert claimed(store).id == crashed[1].id


def test_a_job_given_back_does_not_count_as_crashed(store: JobStore) -> None:
    job = add(store)

    store.give_back([claimed(store)])

    assert state_of(store, job) is JobState.QUEUED
    assert claimed(store).crashes == 0


def test_ended_jobs_expire_and_others_do_not(make_store: MakeStore) -> None:
    store = make_store(ttl_s=0)
    ended, queued = add(store), add(store)
    store.succeed(claimed(store), "1", "{}")

    assert store.get(ended.id) is None
    store.expire()

    assert [job.id for job in store.latest(10)] == [queued.id]
    assert store.ended_of([ended.id, queued.id]) == {ended.id}


def test_another_process_s_changes_are_noticed(store: JobStore, tmp_path: Path) -> None:
    job = add(store)
    before = store.data_version()

    sql(tmp_path / "jobs.sqlite3", f"UPDATE jobs SET n_done = 1 WHERE id = '{job.id}'")

    assert store.data_version() != before


def test_the_files_are_for_this_user_alone(store: JobStore, tmp_path: Path) -> None:
    add(store)

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}

    assert modes == dict.fromkeys(modes, 0o600)
    assert len(modes) == 4


def test_jobs_are_there_after_the_file_was_closed(make_store: MakeStore) -> None:
    store = make_store()
    job = add(store, payload=json.dumps({"text": "kept"}))
    store.close()

    assert make_store().payload(job) == {"text": "kept"}


def test_file_of_another_release_is_refused(tmp_path: Path) -> None:
    sql(tmp_path / "other.sqlite3", "PRAGMA user_version = 99")

    with pytest.raises(sqlite3.DatabaseError, match="another release"):
        JobStore(tmp_path / "other.sqlite3", 60)


def test_file_of_the_first_release_keeps_its_jobs_and_is_used_further(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store()
    before, after = add(store), add(store)
    store.succeed(claimed(store), "1", '{"model": "model"}')
    store.close()
    sql(tmp_path / "jobs.sqlite3", "ALTER TABLE jobs DROP COLUMN meta")
    sql(tmp_path / "jobs.sqlite3", "PRAGMA user_version = 1")

    store = make_store()
    store.succeed(claimed(store), "2", '{"model": "model"}')

    found = [store.get(job.id) for job in (before, after)]
    assert [(job.result, job.meta) for job in found if job] == [(1, None), (2, {"model": "model"})]
