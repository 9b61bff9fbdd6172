"""A consumer whose models run on a Ray cluster, on one machine or on many.

Each model is one application of Ray Serve. Any number of servers share its replicas: who starts a model first deploys
the application, the others find it. Calls go out by Ray Serve's handle, as many at a time as there are replicas, and as
many again that are full; what waits meanwhile goes out as one call afterwards.

A replica or a node that dies costs no request: what it worked on is run again elsewhere, so that a model's function
may run twice. The cluster's head that dies costs the requests a 503 as soon as Ray gives up waiting for it; when it is
back, the next request starts the model again.

Ray ends the process that has lost its cluster, so that a process of its own, the *driver*, speaks with Ray for all
models of an engine: see ``driver``.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from feature_extraction_server.consumers.ray_consumer.driver_process import (
    LOST_RETRY_AFTER_S,
    DriverProcess,
    acquire,
    release,
)
from feature_extraction_server.consumers.ray_consumer.settings import add_model_settings, add_settings
from feature_extraction_server.core.errors import ServerError
from feature_extraction_server.core.jobs import Batch
from feature_extraction_server.core.logs import LogServer
from feature_extraction_server.core.model import ModelRun
from feature_extraction_server.core.tracking import current
from feature_extraction_server.core.wire import Channel

__all__ = ["add_model_settings", "add_settings", "start"]

logger = logging.getLogger(__name__)

_MAX_CALLS: Final = 1024


def start(model: ModelRun, log_server: LogServer) -> threading.Thread:
    """Start the thread that hands the model's jobs to the cluster, and return it."""
    thread = threading.Thread(target=_consume, args=(model, log_server), name=f"consumer-{model.name}", daemon=True)
    thread.start()
    return thread


class Caller:
    """Stands in for the model's module for one call at a time: its functions run on some replica."""

    def __init__(self, driver: DriverProcess, model: str, check_interval_s: float) -> None:
        self.is_wanted: Callable[[], bool] = lambda: True
        self._driver = driver
        self._model = model
        self._check_interval_s = check_interval_s
        self._channel: Channel | None = None

    def __getattr__(self, function: str) -> Callable[..., Any]:
        def call(*positional: Any, **arguments: Any) -> Any:
            if self._channel is None:
                self._channel = self._driver.connect()
            record = current.get()
            message = "call", self._model, function, positional, arguments, record and record.id
            return self._driver.ask(self._channel, message, self.is_wanted, self._check_interval_s)

        return call

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()


class Calls:
    """The calls that are under way, and how many may be.

    Each replica has one that takes what waits, however little that is. A second one goes out ahead of time where it is
    full: it would not be larger later, and the replica need not idle until it has come.
    """

    def __init__(self, model: ModelRun, make: Callable[[], Caller]) -> None:
        self._model = model
        self._make = make
        self._lock = threading.Lock()
        self._free: list[Caller] = []
        self._n_replicas = 1
        self._n_under_way = 0
        self._closed = False

    def resize(self, n_replicas: int) -> None:
        """Take note of how many replicas there are."""
        with self._lock:
            self._n_replicas = max(1, n_replicas)
        self._model.reconsider()

    def least_items(self) -> float:
        """Return how many items must wait for one more call."""
        with self._lock:
            if self._n_under_way < min(self._n_replicas, _MAX_CALLS):
                return 1
            ahead = self._n_under_way < min(2 * self._n_replicas, _MAX_CALLS)
            return self._model.options.max_batch_size if ahead else math.inf

    def begin(self) -> Caller:
        """Count one more call, and return what makes it."""
        with self._lock:
            self._n_under_way += 1
            return self._free.pop() if self._free else self._make()

    def end(self, caller: Caller) -> None:
        """Count one call less, and keep what made it for those that may come."""
        with self._lock:
            self._n_under_way -= 1
            is_spare = self._closed or self._n_under_way + len(self._free) >= 2 * self._n_replicas
            if not is_spare:
                self._free.append(caller)
        if is_spare:
            caller.close()
        self._model.reconsider()

    def close(self) -> None:
        """Let go of what no call needs."""
        with self._lock:
            self._closed = True
            spare, self._free = self._free, []
        for caller in spare:
            caller.close()


class RayModel:
    """Stands in for the model's module: ``load_model`` finds it on the cluster, or has it deployed there."""

    def __init__(self, model: ModelRun) -> None:
        self.calls: Calls | None = None
        self._model = model
        self._driver: DriverProcess | None = None
        self._channel: Channel | None = None
        self._provenance: dict[str, str | None] = {}
        self._replicas: list[dict[str, Any]] = []
        self._here: str | None = None

    def load_model(self) -> None:
        self._driver = acquire()
        try:
            self._channel = self._driver.connect()
            message = "start", self._model.name, self._model.options.stop_grace_period
            told = self._driver.ask(self._channel, message, lambda: self._model.is_wanted, 0.1)
        except BaseException:
            self._let_go()
            raise
        self._provenance, self._here, self._replicas = told
        driver, interval_s = self._driver, self._model.options.result_check_interval
        self.calls = Calls(self._model, lambda: Caller(driver, self._model.name, interval_s))
        self.calls.resize(self._n_running())
        self._model.least_items = self.calls.least_items
        watch = threading.Thread(
            target=self._watch, args=(self._channel, self.calls), name=f"watch-{self._model.name}", daemon=True
        )
        self._channel = None  # the watch's from now on
        watch.start()

    def unload_model(self) -> None:
        """Leave the replicas to other servers, but where a client has stopped the model: then there are none left."""
        assert self._driver is not None
        try:
            channel = self._driver.connect()
            self._driver.ask(channel, ("stop", self._model.name, self._model.stop_was_asked))
            channel.close()
        except ServerError as error:
            logger.warning("The model %s could not be let go of: %s", self._model.name, error.message)
        finally:
            self._let_go()

    def provenance(self) -> dict[str, str | None]:
        return self._provenance

    def replicas(self) -> list[dict[str, Any]]:
        return [replica | {"node": self._elsewhere(replica)} for replica in self._replicas]

    def pids(self) -> list[int]:
        return [one["pid"] for one in self._replicas if one["pid"] is not None and self._elsewhere(one) is None]

    def _elsewhere(self, replica: dict[str, Any]) -> str | None:
        return None if replica["node"] == self._here else replica["node"]

    def _n_running(self) -> int:
        return sum(replica["state"] == "running" for replica in self._replicas)

    def _watch(self, channel: Channel, calls: Calls) -> None:
        """Take note of the replicas as they come and go, until the model has gone from the cluster, or that is lost."""
        try:
            channel.send(("watch", self._model.name))
            while (replicas := channel.receive()) is not None:
                self._replicas = replicas
                calls.resize(self._n_running())
        except (OSError, EOFError):
            if self._model.is_wanted:
                self._model.end("the Ray cluster was lost", LOST_RETRY_AFTER_S)
        else:
            self._model.stop()
        finally:
            channel.close()

    def _let_go(self) -> None:
        if self._channel is not None:
            self._channel.close()
        if self._driver is not None:
            release(self._driver)
        self._driver = self._channel = None


def _consume(model: ModelRun, log_server: LogServer) -> None:
    log_server.configure_worker()
    on_ray = RayModel(model)
    model.module = on_ray
    model.pids, model.replicas = on_ray.pids, on_ray.replicas
    model.load_model()
    jobs = model.fetch_jobs()
    calls = on_ray.calls
    if calls is None:
        list(jobs)  # it was not loaded: there are none
        return

    def run(caller: Caller, job: Batch) -> None:
        job.module = caller
        caller.is_wanted = lambda: not job.abandoned
        try:
            job.run(computes_here=False)
        finally:
            calls.end(caller)

    with ThreadPoolExecutor(_MAX_CALLS, f"calls-{model.name}") as pool:
        for job in jobs:
            pool.submit(run, calls.begin(), job)
    calls.close()
