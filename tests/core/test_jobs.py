"""Jobs, the queue and batches: what joins, what is split, and who fails."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from feature_extraction_server.core import torch_threads
from feature_extraction_server.core.errors import InvalidInput, ModelError, ModelLoadFailed
from feature_extraction_server.core.jobs import Batch, Call, Job, JobQueue
from tests.waiting import TIMEOUT_S, at_once


def job(*items: Any, task: str = "double", **shared: Any) -> Job:
    return Job(Call(task, {"x": list(items), **shared}, ("x",)))


def run_all(queue: JobQueue, function: Callable[..., Any], max_items: int = 32) -> int:
    """Run everything that waits and return how many calls were asked for."""
    n_batches = 0
    while pieces := queue.take(max_items):
        Batch("model", SimpleNamespace(**{pieces[0].job.task: function}), pieces).run()
        n_batches += 1
    return n_batches


def queue_of(*jobs: Job) -> JobQueue:
    queue = JobQueue()
    for waiting in jobs:
        queue.put(waiting)
    return queue


def double(x: list[int], **shared: Any) -> list[int]:
    return [2 * item for item in x]


def test_waiting_jobs_of_one_task_join_one_batch_and_each_gets_its_own_answer() -> None:
    jobs = [job(1), job(2, 3), job(4)]

    n_batches = run_all(queue_of(*jobs), double)

    assert n_batches == 1
    assert [waiting.future.result(0) for waiting in jobs] == [[2], [4, 6], [8]]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(job(2, task="triple"), id="another task"),
        pytest.param(job(2, config={"n": 2}), id="another config"),
        pytest.param(job(2, config={"n": True}), id="true is not 1"),
        pytest.param(job(2, config={"n": 1.0}), id="1.0 is not 1"),
        pytest.param(Job(Call("double", {"x": [2], "config": {"n": 1}})), id="a task that declares no batch fields"),
    ],
)
def test_jobs_that_differ_in_more_than_their_items_do_not_join(other: Job) -> None:
    queue = queue_of(job(1, config={"n": 1}), other)

    assert len(queue.take(32)) == 1
    assert len(queue.take(32)) == 1


def test_a_job_behind_one_that_cannot_join_joins_and_order_is_kept_for_the_rest() -> None:
    first, between, last = job(1), job(2, config={}), job(3)
    queue = queue_of(first, between, last)

    assert [piece.job for piece in queue.take(32)] == [first, last]
    assert [piece.job for piece in queue.take(32)] == [between]


def test_a_job_larger_than_a_batch_is_spread_over_several_and_answered_in_order() -> None:
    large, small = job(*range(70)), job(100)
    sizes: list[int] = []

    def record(x: list[int]) -> list[int]:
        sizes.append(len(x))
        return double(x)

    run_all(queue_of(large, small), record)

    assert sizes == [32, 32, 7]
    assert large.future.result(0) == [2 * item for item in range(70)]
    assert small.future.result(0) == [200]


def test_a_job_larger_than_a_batch_does_not_keep_others_waiting_for_all_of_it() -> None:
    large, small = job(*range(100)), job(100, config={})
    queue = queue_of(large, small)

    order = [queue.take(32)[0].job for _ in range(5)]

    assert order == [large, small, large, large, large]


def test_a_poisoned_job_fails_alone() -> None:
    jobs = [job(1), job(13), job(3)]

    def refuse_13(x: list[int]) -> list[int]:
        if 13 in x:
            raise RuntimeError("thirteen")
        return double(x)

    run_all(queue_of(*jobs), refuse_13)

    assert jobs[0].future.result(0) == [2]
    assert jobs[2].future.result(0) == [6]
    with pytest.raises(ModelError, match="RuntimeError: thirteen"):
        jobs[1].future.result(0)


def test_a_poisoned_job_among_many_is_found_in_few_calls() -> None:
    jobs = [job(n) for n in range(32)]
    n_calls = 0

    def refuse_13(x: list[int]) -> list[int]:
        nonlocal n_calls
        n_calls += 1
        if 13 in x:
            raise RuntimeError("thirteen")
        return double(x)

    run_all(queue_of(*jobs), refuse_13)

    assert [waiting.future.result(0) for waiting in jobs if waiting is not jobs[13]] == [
        [2 * n] for n in range(32) if n != 13
    ]
    assert isinstance(jobs[13].future.exception(0), ModelError)
    assert n_calls == 11


def test_a_call_that_failed_is_not_tried_again_for_those_who_have_left() -> None:
    jobs = [job(n) for n in range(8)]
    asked: list[list[int]] = []

    def give_up(x: list[int]) -> list[int]:
        asked.append(x)
        for waiting in jobs[1:]:
            waiting.cancel()
        raise RuntimeError("its process was killed")

    run_all(queue_of(*jobs), give_up)

    assert asked == [list(range(8)), [0]]


def test_a_function_that_cannot_load_what_one_job_needs_fails_that_job_alone() -> None:
    jobs = [job(1), job(13), job(3)]

    def load_more(x: list[int]) -> list[int]:
        if 13 in x:
            raise ModelLoadFailed("no weights for 13")
        return double(x)

    run_all(queue_of(*jobs), load_more)

    assert [type(waiting.future.exception(0)) for waiting in jobs] == [type(None), ModelLoadFailed, type(None)]


@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt(), MemoryError(), StopIteration()], ids=repr)
def test_whatever_a_model_raises_is_the_jobs_error(raised: BaseException) -> None:
    waiting = job(1)

    def fail(x: list[int]) -> list[int]:
        raise raised

    run_all(queue_of(waiting), fail)

    with pytest.raises(ModelError, match=type(raised).__name__):
        waiting.future.result(0)


def test_an_error_that_blames_the_client_stays_as_it_is() -> None:
    waiting = job(1)

    def refuse(x: list[int]) -> list[int]:
        raise InvalidInput("the prompt is too long", field="text")

    run_all(queue_of(waiting), refuse)

    with pytest.raises(InvalidInput, match="too long") as caught:
        waiting.future.result(0)
    assert caught.value.field == "text"


@pytest.mark.parametrize("results", [[], [1, 2], None, 5, "a", {"a": 1}], ids=repr)
def test_a_wrong_number_of_results_is_the_models_error(results: Any) -> None:
    waiting = job(1)

    run_all(queue_of(waiting), lambda x: results)

    with pytest.raises(ModelError):
        waiting.future.result(0)


def test_a_job_whose_waiter_has_left_is_not_run() -> None:
    left, stayed = job(1), job(2)
    queue = queue_of(left, stayed)
    left.cancel()
    seen: list[int] = []

    def record(x: list[int]) -> list[int]:
        seen.extend(x)
        return x

    run_all(queue, record)

    assert seen == [2]
    assert len(queue) == 0


def test_a_job_that_was_cancelled_while_running_takes_nobody_along() -> None:
    left, stayed = job(1), job(2)

    def leave_meanwhile(x: list[int]) -> list[int]:
        left.cancel()
        return double(x)

    run_all(queue_of(left, stayed), leave_meanwhile)

    assert stayed.future.result(0) == [4]


def test_a_job_without_batch_fields_is_called_as_it_was_made() -> None:
    waiting = Job(Call("add", {"b": 2}, positional=(1,)))

    run_all(queue_of(waiting), lambda a, b: a + b)

    assert waiting.future.result(0) == 3


def test_where_more_texts_wait_than_fit_the_first_goes_with_those_of_like_length() -> None:
    jobs = [job(n * "x") for n in (50, 1, 49, 2, 51, 3)]
    queue = queue_of(*jobs)

    batches = [[piece.job for piece in queue.take(3)] for _ in range(2)]

    assert [set(batch) for batch in batches] == [{jobs[0], jobs[2], jobs[4]}, {jobs[1], jobs[3], jobs[5]}]


def test_texts_that_fit_one_batch_go_together_whatever_their_lengths() -> None:
    queue = queue_of(job("x"), job(1000 * "x"), job("y"))

    assert len(queue.take(3)) == 3


def test_nothing_is_taken_before_as_much_waits_as_is_asked_for() -> None:
    queue = queue_of(job("x"), job("y"))

    assert queue.take(3, 3) == []
    assert queue.take(3, math.inf) == []
    queue.put(job("z", "z"))
    assert sum(piece.stop - piece.start for piece in queue.take(3, 3)) == 3
    assert len(queue.take(3)) == 1


def test_the_texts_of_a_large_job_run_by_length_and_are_answered_in_their_order() -> None:
    texts = ["dddd", "a", "ccc", "bb", "eeeee"]
    waiting = job(*texts)
    calls: list[list[str]] = []

    def upper(x: list[str]) -> list[str]:
        calls.append(x)
        return [text.upper() for text in x]

    run_all(queue_of(waiting), upper, max_items=2)

    assert calls == [["a", "bb"], ["ccc", "dddd"], ["eeeee"]]
    assert waiting.future.result(0) == [text.upper() for text in texts]


def test_pieces_of_a_job_that_are_done_at_the_same_moment_both_count() -> None:
    waiting = job(1, 2)
    both = threading.Barrier(2)

    class Results(list[int]):
        """Meets the other piece's results where it is asked for its length a second time."""

        n_asked = 0

        def __len__(self) -> int:
            self.n_asked += 1
            if self.n_asked == 2:
                both.wait(TIMEOUT_S)
            return super().__len__()

    at_once(2, lambda index: waiting.succeed(index, Results([10 * index])))

    assert waiting.future.result(0) == [0, 10]


@pytest.mark.parametrize("computes_here", [True, False])
def test_a_call_that_only_waits_for_another_machine_takes_no_share_of_the_cores(computes_here: bool) -> None:
    n_at_work: list[int] = []
    pieces = queue_of(job(1)).take(1)

    def look(x: list[int]) -> list[int]:
        n_at_work.append(torch_threads._n_at_work)
        return x

    Batch("model", SimpleNamespace(double=look), pieces).run(computes_here=computes_here)

    assert n_at_work == [computes_here]
