"""A model's life: starts and stops that cross, loads that fail, consumers that die, and what waiters are told."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from feature_extraction_server.consumers import single_thread_consumer
from feature_extraction_server.core.cores import N_CORES
from feature_extraction_server.core.errors import (
    DeadlineExceeded,
    InvalidInput,
    ModelError,
    ModelLoadFailed,
    ModelUnavailable,
    QueueFull,
)
from feature_extraction_server.core.jobs import Call, Job
from feature_extraction_server.core.logs import LogServer
from feature_extraction_server.core.model import Model, ModelOptions, ModelRun, State
from tests.waiting import wait_until

WAIT_S = 20
SOON = ModelOptions(result_check_interval=0.01, stop_grace_period=WAIT_S, load_retry_delay=0)


class QuietLog:
    def configure_worker(self) -> None:
        pass


class Fake:
    """A model module whose loading and running the test opens, and which counts what is done to it."""

    def __init__(self) -> None:
        self.may_load = threading.Event()
        self.may_run = threading.Event()
        self.may_load.set()
        self.may_run.set()
        self.called = threading.Semaphore(0)
        self.n_loads = 0
        self.load_error: BaseException | None = None
        self.batches: list[list[Any]] = []
        self.module = ModuleType("fake_model")
        self.module.__dict__.update(load_model=self.load_model, echo=self.echo)

    def load_model(self) -> None:
        assert self.may_load.wait(WAIT_S)
        self.n_loads += 1
        self.module.__dict__["weights"] = bytearray(10)
        if self.load_error is not None:
            raise self.load_error

    def echo(self, x: list[Any]) -> list[Any]:
        self.batches.append(x)
        self.called.release()
        assert self.may_run.wait(WAIT_S)
        if "poison" in x:
            raise RuntimeError("poisoned")
        return x


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def make(fake: Fake) -> Iterator[Callable[..., Model]]:
    models: list[Model] = []

    def make(options: ModelOptions = SOON, start_consumer: Any = single_thread_consumer.start) -> Model:
        log_server = cast(LogServer, QuietLog())
        models.append(Model("fake", fake.module, "single_thread_consumer", start_consumer, log_server, options))
        return models[-1]

    yield make
    fake.may_load.set()
    fake.may_run.set()
    for model in models:
        model.stop()
        model.join(WAIT_S)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(80) as executor:
        yield executor


def ask(model: Model, *items: Any, timeout_s: float = WAIT_S) -> Any:
    job = Job(Call("echo", {"x": list(items)}, ("x",)))
    model.submit(job)
    return model.wait(job, time.monotonic() + timeout_s)


def ask_in_parts(model: Model, rest: Callable[[], dict[str, Any]], n_items: int = 1) -> Any:
    job = Job(Call("echo", {}, ("x",), n_items=n_items, rest=rest))
    model.submit(job)
    return model.wait(job, time.monotonic() + WAIT_S)


def wait_for(model: Model, *states: State) -> State:
    return model.wait_for_state(states, time.monotonic() + WAIT_S)


def test_a_request_starts_a_stopped_model(make: Callable[..., Model], fake: Fake) -> None:
    model = make()

    assert ask(model, 1, 2) == [1, 2]
    assert model.status()["state"] == "running"
    assert fake.n_loads == 1


def test_64_first_requests_at_once_load_the_model_once(
    make: Callable[..., Model], fake: Fake, pool: ThreadPoolExecutor
) -> None:
    model = make()
    fake.may_load.clear()

    answers = [pool.submit(ask, model, n) for n in range(64)]
    wait_until(lambda: model.status()["queue_depth"] == 64)
    fake.may_load.set()

    assert [answer.result(WAIT_S) for answer in answers] == [[n] for n in range(64)]
    assert fake.n_loads == 1
    assert len(fake.batches) == 2


def test_what_waits_while_the_model_is_busy_goes_out_as_one_call(
    make: Callable[..., Model], fake: Fake, pool: ThreadPoolExecutor
) -> None:
    model = make()
    fake.may_run.clear()

    answers = [pool.submit(ask, model, "first")]
    assert fake.called.acquire(timeout=WAIT_S)
    answers += [pool.submit(ask, model, item) for item in ("a", "poison", "b")]
    wait_until(lambda: model.status()["queue_depth"] == 3)
    fake.may_run.set()

    assert [answers[n].result(WAIT_S) for n in (0, 1, 3)] == [["first"], ["a"], ["b"]]
    with pytest.raises(ModelError, match="poisoned"):
        answers[2].result(WAIT_S)
    assert fake.batches[0] == ["first"]
    assert sorted(fake.batches[1]) == ["a", "b", "poison"]


def test_stopping_drops_what_loading_made_and_the_model_starts_again(make: Callable[..., Model], fake: Fake) -> None:
    model = make()
    ask(model, 1)

    model.stop()
    wait_for(model, State.STOPPED)

    assert "weights" not in vars(fake.module)
    assert ask(model, 2) == [2]
    assert fake.n_loads == 2


def test_model_stops_while_another_thread_still_imports_torch(
    make: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    ask(model, 1)
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))

    model.stop()
    wait_for(model, State.STOPPED)

    assert ask(model, 2) == [2]


def test_unload_model_takes_the_place_of_dropping_globals(make: Callable[..., Model], fake: Fake) -> None:
    model = make()
    unloaded = threading.Event()
    fake.module.__dict__["unload_model"] = unloaded.set
    ask(model, 1)

    model.stop()
    wait_for(model, State.STOPPED)

    assert unloaded.is_set()
    assert "weights" in vars(fake.module)


def test_stopping_lets_accepted_jobs_finish(make: Callable[..., Model], fake: Fake, pool: ThreadPoolExecutor) -> None:
    model = make()
    fake.may_run.clear()
    running = pool.submit(ask, model, "running")
    assert fake.called.acquire(timeout=WAIT_S)
    waiting = pool.submit(ask, model, "waiting")
    wait_until(lambda: model.status()["queue_depth"] == 1)

    model.stop()
    assert model.status()["state"] == "stopping"
    fake.may_run.set()

    assert running.result(WAIT_S) == ["running"]
    assert waiting.result(WAIT_S) == ["waiting"]
    wait_for(model, State.STOPPED)


def test_jobs_that_outlast_the_grace_period_fail(
    make: Callable[..., Model], fake: Fake, pool: ThreadPoolExecutor
) -> None:
    model = make(ModelOptions(stop_grace_period=0.05))
    fake.may_run.clear()
    running = pool.submit(ask, model, "running")
    assert fake.called.acquire(timeout=WAIT_S)
    waiting = pool.submit(ask, model, "waiting")
    wait_until(lambda: model.status()["queue_depth"] == 1)

    model.stop()

    for answer in (running, waiting):
        with pytest.raises(ModelUnavailable, match="stopped"):
            answer.result(WAIT_S)
    assert model.status()["state"] == "stopping"
    fake.may_run.set()
    wait_for(model, State.STOPPED)


def test_a_start_after_a_stop_wins_and_loads_anew(
    make: Callable[..., Model], fake: Fake, pool: ThreadPoolExecutor
) -> None:
    model = make()
    fake.may_run.clear()
    running = pool.submit(ask, model, "running")
    assert fake.called.acquire(timeout=WAIT_S)

    model.stop()
    model.start()
    fake.may_run.set()

    assert running.result(WAIT_S) == ["running"]
    wait_for(model, State.RUNNING)
    assert fake.n_loads == 2


def test_a_stop_after_a_start_wins(make: Callable[..., Model], fake: Fake) -> None:
    model = make()
    fake.may_load.clear()

    model.start()
    wait_for(model, State.LOADING)
    model.stop()
    fake.may_load.set()

    assert wait_for(model, State.STOPPED, State.RUNNING) is State.STOPPED


def test_a_request_to_a_stopping_model_is_answered_by_its_next_life(
    make: Callable[..., Model], fake: Fake, pool: ThreadPoolExecutor
) -> None:
    model = make()
    fake.may_run.clear()
    running = pool.submit(ask, model, "running")
    assert fake.called.acquire(timeout=WAIT_S)
    model.stop()

    late = pool.submit(ask, model, "late")
    wait_until(lambda: model.status()["queue_depth"] == 1)
    fake.may_run.set()

    assert running.result(WAIT_S) == ["running"]
    assert late.result(WAIT_S) == ["late"]
    assert fake.n_loads == 2


def test_a_last_stop_fails_the_requests_that_waited_for_the_next_life(
    make: Callable[..., Model], fake: Fake, pool: ThreadPoolExecutor
) -> None:
    model = make()
    fake.may_run.clear()
    pool.submit(ask, model, "running")
    assert fake.called.acquire(timeout=WAIT_S)
    model.stop()
    late = pool.submit(ask, model, "late")
    wait_until(lambda: model.status()["queue_depth"] == 1)

    model.stop()
    fake.may_run.set()

    with pytest.raises(ModelUnavailable, match="was stopped"):
        late.result(WAIT_S)
    wait_for(model, State.STOPPED)
    assert fake.n_loads == 1


@pytest.mark.parametrize("error", [RuntimeError("no weights"), SystemExit("no weights")], ids=repr)
def test_a_failed_load_fails_its_waiters_with_the_reason(
    make: Callable[..., Model], fake: Fake, error: BaseException
) -> None:
    model = make()
    fake.load_error = error

    with pytest.raises(ModelLoadFailed, match="no weights"):
        ask(model, 1)

    assert model.status()["state"] == "failed"
    assert "no weights" in model.status()["error"]
    assert "weights" not in vars(fake.module)


def test_a_load_that_fails_for_a_passing_reason_is_no_fault_of_the_model_s(
    make: Callable[..., Model], fake: Fake
) -> None:
    model = make(replace(SOON, load_retry_delay=60))
    fake.load_error = ModelUnavailable("no cluster answers", retry_after=5)

    for _ in range(2):  # the second one meets a model that has failed
        with pytest.raises(ModelUnavailable, match="no cluster answers") as caught:
            ask(model, 1)
        assert type(caught.value) is ModelUnavailable
        assert caught.value.retry_after == pytest.approx(60, abs=5)


@pytest.mark.parametrize("error", [ModelUnavailable("its process died"), ModelLoadFailed("no weights", retry_after=5)])
def test_a_load_that_fails_for_another_reason_is_a_fault_of_the_model_s(
    make: Callable[..., Model], fake: Fake, error: ModelUnavailable
) -> None:
    model = make()
    fake.load_error = error

    with pytest.raises(ModelLoadFailed, match=error.message):
        ask(model, 1)


def test_a_failed_load_is_not_retried_by_requests_before_the_delay_but_by_a_start(
    make: Callable[..., Model], fake: Fake
) -> None:
    model = make(ModelOptions(load_retry_delay=3600))
    fake.load_error = RuntimeError("no weights")
    for _ in range(3):
        with pytest.raises(ModelLoadFailed, match="no weights"):
            ask(model, 1)
    assert fake.n_loads == 1

    fake.load_error = None
    model.start()

    wait_for(model, State.RUNNING)
    assert ask(model, 1) == [1]


def test_a_failed_load_is_retried_by_a_request_after_the_delay(make: Callable[..., Model], fake: Fake) -> None:
    model = make(SOON)
    fake.load_error = RuntimeError("no weights")
    with pytest.raises(ModelLoadFailed):
        ask(model, 1)
    fake.load_error = None

    assert ask(model, 1) == [1]


def test_a_failed_model_that_is_to_run_is_loaded_again_less_and_less_often(
    make: Callable[..., Model], fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(replace(SOON, load_retry_delay=10))
    clock = 1000.0
    monkeypatch.setattr("feature_extraction_server.core.model.time", SimpleNamespace(monotonic=lambda: clock))
    fake.load_error = OSError("no hub")
    loaded_at = []

    def load_again() -> None:
        nonlocal clock
        n_loads = fake.n_loads
        clock += 1
        model.retry()
        wait_until(lambda: model.state is State.FAILED)
        if fake.n_loads > n_loads:
            loaded_at.append(clock)

    model.start()
    wait_until(lambda: model.state is State.FAILED)
    for _ in range(1000):
        load_again()

    waits = [after - before for before, after in zip([1000, *loaded_at], loaded_at, strict=False)]
    assert waits == [10, 20, 40, 80, 160, 320, 320]


def test_a_model_that_was_stopped_is_not_loaded_again(make: Callable[..., Model], fake: Fake) -> None:
    model = make()
    fake.load_error = OSError("no hub")
    model.start()
    wait_for(model, State.FAILED)
    model.stop()

    model.retry()

    assert model.state is State.STOPPED


def test_stopping_a_failed_model_makes_it_stopped(make: Callable[..., Model], fake: Fake) -> None:
    model = make()
    fake.load_error = RuntimeError("no weights")
    with pytest.raises(ModelLoadFailed):
        ask(model, 1)

    model.stop()

    assert model.status()["state"] == "stopped"
    assert model.status()["error"] is None


def test_a_full_queue_refuses_at_once(make: Callable[..., Model], fake: Fake, pool: ThreadPoolExecutor) -> None:
    model = make(ModelOptions(max_queue_size=2))
    fake.may_run.clear()
    answers: list[Future[Any]] = [pool.submit(ask, model, "running")]
    assert fake.called.acquire(timeout=WAIT_S)
    answers += [pool.submit(ask, model, n) for n in range(2)]
    wait_until(lambda: model.status()["queue_depth"] == 2)

    with pytest.raises(QueueFull, match="2 jobs") as caught:
        ask(model, "one too many")

    assert caught.value.retry_after
    fake.may_run.set()
    assert [answer.result(WAIT_S) for answer in answers] == [["running"], [0], [1]]


def test_a_deadline_is_kept_whatever_the_check_interval_and_the_job_is_not_run_later(
    make: Callable[..., Model], fake: Fake, pool: ThreadPoolExecutor
) -> None:
    model = make(ModelOptions(result_check_interval=3600))
    fake.may_run.clear()
    running = pool.submit(ask, model, "running")
    assert fake.called.acquire(timeout=WAIT_S)

    with pytest.raises(DeadlineExceeded):
        ask(model, "late", timeout_s=0.05)

    assert model.status()["queue_depth"] == 0
    fake.may_run.set()
    assert running.result(WAIT_S) == ["running"]
    assert fake.batches == [["running"]]


def test_a_result_is_handed_over_at_once_whatever_the_check_interval(make: Callable[..., Model]) -> None:
    model = make(ModelOptions(result_check_interval=3600))

    assert ask(model, 1, timeout_s=WAIT_S) == [1]


def test_a_consumer_that_dies_fails_its_jobs_and_the_next_request_starts_another(
    make: Callable[..., Model], fake: Fake
) -> None:
    n_started = 0

    def die_on_first_job(run: ModelRun, log_server: LogServer) -> threading.Thread:
        nonlocal n_started
        n_started += 1

        def consume(fatal: bool) -> None:
            run.load_model()
            jobs = run.fetch_jobs()
            for job in jobs:
                if fatal:
                    graveyard.append(jobs)  # a killed process does not run its generators' finally either
                    return
                job.run()

        thread = threading.Thread(target=consume, args=(n_started == 1,), name="consumer-mortal", daemon=True)
        thread.start()
        return thread

    graveyard: list[Any] = []
    model = make(SOON, die_on_first_job)

    with pytest.raises(ModelUnavailable, match="died"):
        ask(model, 1)
    assert model.status()["state"] == "failed"

    assert ask(model, 2) == [2]
    assert n_started == 2


def test_a_consumer_may_leave_a_batch_waiting_until_more_has_come_or_it_wants_less(
    make: Callable[..., Model], fake: Fake, pool: ThreadPoolExecutor
) -> None:
    runs: list[ModelRun] = []

    def start(run: ModelRun, log_server: LogServer) -> threading.Thread:
        runs.append(run)
        run.least_items = lambda: 3
        return single_thread_consumer.start(run, log_server)

    model = make(start_consumer=start)

    answers = [pool.submit(ask, model, *items) for items in (["a"], ["b", "c"])]
    assert sorted(answer.result(WAIT_S)[0] for answer in answers) == ["a", "b"]
    answers = [pool.submit(ask, model, "d")]
    wait_until(lambda: model.status()["queue_depth"] == 1)
    runs[0].least_items = lambda: 1
    runs[0].reconsider()
    assert answers[0].result(WAIT_S) == ["d"]
    assert [len(batch) for batch in fake.batches] == [3, 1]


def test_a_consumer_that_leaves_its_jobs_shows_as_a_failed_model(make: Callable[..., Model]) -> None:
    def leave_at_once(run: ModelRun, log_server: LogServer) -> threading.Thread:
        def consume() -> None:
            run.load_model()
            for _ in run.fetch_jobs():
                break

        thread = threading.Thread(target=consume, name="consumer-lazy", daemon=True)
        thread.start()
        return thread

    model = make(SOON, leave_at_once)

    with pytest.raises(ModelUnavailable, match="consumer left"):
        ask(model, 1)


def test_a_consumer_that_does_not_start_shows_as_a_failed_model(make: Callable[..., Model]) -> None:
    def refuse(run: ModelRun, log_server: LogServer) -> threading.Thread:
        raise RuntimeError("no thread for you")

    model = make(SOON, refuse)

    with pytest.raises(ModelUnavailable, match="no thread for you"):
        ask(model, 1)
    assert model.status()["state"] == "failed"


def test_start_and_stop_may_be_repeated(make: Callable[..., Model], fake: Fake) -> None:
    model = make()

    model.stop()
    model.start()
    model.start()
    wait_for(model, State.RUNNING)
    model.start()
    model.stop()
    model.stop()

    wait_for(model, State.STOPPED)
    assert fake.n_loads == 1


def test_starts_stops_and_requests_from_many_threads_lose_no_job(
    make: Callable[..., Model], fake: Fake, pool: ThreadPoolExecutor
) -> None:
    model = make()

    def disturb(n: int) -> None:
        (model.stop if n % 2 else model.start)()

    def request(n: int) -> bool:
        try:
            return bool(ask(model, n) == [n])
        except ModelUnavailable:
            return True  # told, not lost

    answers = []
    for n in range(300):
        answers.append(pool.submit(request, n))
        if n % 3 == 0:
            pool.submit(disturb, n)

    assert all(answer.result(WAIT_S) for answer in answers)
    model.stop()
    wait_for(model, State.STOPPED)
    assert model.status()["running_jobs"] == 0


def test_a_model_without_requests_stops_itself_and_starts_again(make: Callable[..., Model], fake: Fake) -> None:
    model = make(ModelOptions(idle_timeout=0.05))
    assert ask(model, 1) == [1]

    wait_for(model, State.STOPPED)

    assert "weights" not in vars(fake.module)
    assert ask(model, 2) == [2]


def test_a_model_at_work_is_not_idle_however_long_it_takes(
    make: Callable[..., Model], fake: Fake, pool: ThreadPoolExecutor
) -> None:
    model = make(ModelOptions(idle_timeout=0.05, result_check_interval=0.01))
    fake.may_run.clear()
    answer = pool.submit(ask, model, 1)
    assert fake.called.acquire(timeout=WAIT_S)

    with pytest.raises(DeadlineExceeded):
        model.wait_for_state([State.STOPPING, State.STOPPED], time.monotonic() + 0.3)

    fake.may_run.set()
    assert answer.result(WAIT_S) == [1]
    wait_for(model, State.STOPPED)


def test_arguments_that_come_later_are_got_for_what_is_run_next_only(
    make: Callable[..., Model], fake: Fake, pool: ThreadPoolExecutor
) -> None:
    options = replace(SOON, max_batch_size=2 * N_CORES)
    model = make(options)
    got: list[int] = []

    def rest(n: int) -> dict[str, Any]:
        got.append(n)
        return {"x": [n]}

    fake.may_run.clear()
    running = pool.submit(ask, model, -1)
    assert fake.called.acquire(timeout=WAIT_S)
    n = 3 * options.max_batch_size
    answers = [pool.submit(ask_in_parts, model, partial(rest, index)) for index in range(n)]
    wait_until(lambda: model.status()["queue_depth"] == n)
    wait_until(lambda: len(got) == options.max_batch_size)
    time.sleep(0.1)
    n_got_at_first = len(got)
    fake.may_run.set()

    assert n_got_at_first == options.max_batch_size
    assert running.result(WAIT_S) == [-1]
    assert [answer.result(WAIT_S) for answer in answers] == [[index] for index in range(n)]
    assert sorted(got) == list(range(n))


@pytest.mark.parametrize("is_stopping", [False, True])
def test_who_cannot_get_the_rest_of_the_arguments_makes_room_for_the_next(
    is_stopping: bool, make: Callable[..., Model], fake: Fake, pool: ThreadPoolExecutor
) -> None:
    model = make(replace(SOON, max_batch_size=1))

    def fail() -> dict[str, Any]:
        raise InvalidInput("no picture")

    fake.may_run.clear()
    running = pool.submit(ask, model, -1)
    assert fake.called.acquire(timeout=WAIT_S)
    if is_stopping:
        model.stop()  # they wait for its next life
    failing = [pool.submit(ask_in_parts, model, fail) for _ in range(3 * N_CORES)]
    for answer in failing:
        with pytest.raises(InvalidInput):
            answer.result(WAIT_S)
    good = pool.submit(ask_in_parts, model, lambda: {"x": [1]})
    fake.may_run.set()

    assert (running.result(WAIT_S), good.result(WAIT_S)) == ([-1], [1])
    assert [1] in fake.batches
    assert model.status()["counts"]["failures"] == 0


def test_a_stop_answers_those_whose_arguments_nobody_asked_for(
    make: Callable[..., Model], fake: Fake, pool: ThreadPoolExecutor
) -> None:
    model = make(replace(SOON, max_batch_size=1, stop_grace_period=0.05))
    fake.may_run.clear()
    pool.submit(ask, model, -1)
    assert fake.called.acquire(timeout=WAIT_S)
    n = 4 * N_CORES
    answers = [pool.submit(ask_in_parts, model, lambda: {"x": [1]}) for _ in range(n)]
    wait_until(lambda: model.status()["queue_depth"] == n)

    model.stop()

    for answer in answers:
        with pytest.raises(ModelUnavailable, match="was stopped"):
            answer.result(WAIT_S)


def test_a_small_job_does_not_wait_for_a_large_one_that_still_gets_its_arguments(
    make: Callable[..., Model], fake: Fake, pool: ThreadPoolExecutor
) -> None:
    model = make()
    may_decode = threading.Event()

    def rest() -> dict[str, Any]:
        assert may_decode.wait(WAIT_S)
        return {"x": [1] * n}

    n = 10 * model.options.n_decoded_ahead
    large = pool.submit(ask_in_parts, model, rest, n)
    wait_until(lambda: model.status()["queue_depth"] == 1)

    assert ask(model, 2) == [2]
    assert ask_in_parts(model, lambda: {"x": [3]}) == [3]
    may_decode.set()
    assert large.result(WAIT_S) == [1] * n


class Item:
    """What a weak reference can be had to."""


def test_a_model_that_loads_keeps_nothing_of_requests_that_were_given_up(
    make: Callable[..., Model], fake: Fake
) -> None:
    model = make()
    item = Item()
    asked = weakref.ref(item)
    fake.may_load.clear()

    with pytest.raises(DeadlineExceeded):
        ask(model, item, timeout_s=0.05)
    del item

    wait_until(lambda: asked() is None)
    assert model.state is State.LOADING


def test_an_idle_model_keeps_nothing_of_its_last_request(make: Callable[..., Model], fake: Fake) -> None:
    model = make()
    item = Item()
    asked = weakref.ref(item)
    ask(model, item)
    fake.batches.clear()

    del item

    wait_until(lambda: asked() is None)
