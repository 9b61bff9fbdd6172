"""The monitoring API: ``/health/live`` and ``/health/ready`` for supervisors, ``/metrics`` for Prometheus.

What models do is told by the engine, the one for all web workers. Requests are counted by the web workers, each in
a file of its own in the server's private directory, so that whichever answers can add up all of them. The file of a
worker that has ended is the next one's, which counts on from there. The directory goes with the server.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from flask import Flask, Response, request
from prometheus_client import CollectorRegistry, Counter, generate_latest, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector

from feature_extraction_server.core.application import ApplicationInterface
from feature_extraction_server.core.errors import DeadlineExceeded, ModelUnavailable
from feature_extraction_server.core.model import State
from feature_extraction_server.core.places import take_place
from feature_extraction_server.core.tracking import current
from feature_extraction_server.flask.openapi import json_response, operation

logger = logging.getLogger(__name__)

TAG: Final = "monitoring API"
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
#: A health check is to be answered within 100 ms, and metrics before the scraper gives up.
HEALTH_TIMEOUT_S: Final = 0.08
METRICS_TIMEOUT_S: Final = 1.0
#: An engine that answers late, a model holding Python's interpreter lock, is taken to be as it was this long ago.
REMEMBERED_S: Final = 5.0
#: Of the file in which a web worker counts: room for four thousand combinations of labels.
COUNTS_BYTES: Final = 1 << 20

Overview = list[dict[str, Any]]


def add_routes(application_interface: ApplicationInterface, flask_app: Flask) -> None:
    """Add the routes, and count every request from now on."""
    count, collected = _count_requests(application_interface)
    collected.register(EngineCollector(application_interface))
    readiness = Readiness(application_interface)

    def ready() -> tuple[dict[str, str], int]:
        reason = readiness.missing()
        return ({"status": "ready"}, 200) if reason is None else ({"status": "not ready", "reason": reason}, 503)

    flask_app.after_request(count)
    flask_app.add_url_rule("/health/live", "monitoring_api live", lambda: {"status": "live"})
    flask_app.add_url_rule("/health/ready", "monitoring_api ready", ready)
    flask_app.add_url_rule(
        "/metrics", "monitoring_api metrics", lambda: Response(generate_latest(collected), content_type=CONTENT_TYPE)
    )


class Readiness:
    """Whether all of PRELOAD_MODELS have been loaded, and none of them has failed since.

    One that was stopped, by MODEL_IDLE_TIMEOUT, say, is started by a request, which only a server that is ready gets.
    """

    def __init__(self, application: ApplicationInterface) -> None:
        self._application = application
        self._models = application.settings.preload_models()
        self._last: tuple[float, str | None] | None = None

    def missing(self) -> str | None:
        """Return what there is still to wait for, in words; None when the server is ready."""
        if not self._models:
            return None
        try:
            states = {told["model"]: told for told in self._application.overview(HEALTH_TIMEOUT_S)}
        except ModelUnavailable as error:
            return error.message
        except DeadlineExceeded as error:
            last = self._last
            return last[1] if last is not None and time.monotonic() < last[0] + REMEMBERED_S else error.message
        waiting = [name for name in self._models if not states.get(name, {}).get("has_started")]
        reason = "; ".join(_reason(name, states.get(name)) for name in waiting) or None
        self._last = time.monotonic(), reason
        return reason


def _reason(name: str, told: dict[str, Any] | None) -> str:
    if told is None:
        return f"the model {name} is left out, since its plugin failed"
    return f"the model {name} is {told['state']}" + (f": {told['error']}" if told["error"] else "")


# What web workers count


def _count_requests(application: ApplicationInterface) -> tuple[Callable[[Response], Response], CollectorRegistry]:
    """Return what counts a request by its answer, and the registry that collects the counts of all web workers."""
    collected, own = CollectorRegistry(), CollectorRegistry()
    place: _Place | None = None
    directory = application.shared_directory and application.shared_directory / "metrics"
    if directory is None:
        values.ValueClass = values.MutexValue
        own = collected
    else:
        # The library itself would decide when it is first imported, and for the whole process.
        directory.mkdir(exist_ok=True)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
        place = _Place(directory)
        values.ValueClass = values.MultiProcessValue(place.number)  # type: ignore[no-untyped-call]
        collected.register(_OfAllWorkers(directory))
    labels = ("method", "route", "task", "model", "status")
    requests = Counter("fes_requests", "Requests that were answered", labels, registry=own)
    counters: dict[tuple[str, ...], Counter] = {}  # the library's own look-up takes several times as long

    def count(response: Response) -> Response:
        asked = request._get_current_object()  # type: ignore[attr-defined]  # once, since each look-up takes its time
        record = current.get()
        method = route = task = model = ""
        if (rule := asked.url_rule) is not None:  # what matches none may be anything
            method, route = asked.method, rule.rule
            named = asked.view_args.get("model") if asked.view_args else None
            model = named if named in application.registry.models else ""
        if record is not None and record.task is not None and record.model is not None:
            task, model = record.task, record.model
        key = method, route, task, model, str(response.status_code)
        try:
            if (counter := counters.get(key)) is None:
                if place is not None:
                    place.make_room()
                counter = counters[key] = requests.labels(*key)
            counter.inc()
        except OSError:  # a full disk, or none of that directory: the answer is worth more than its count
            logger.debug("A request could not be counted", exc_info=True)
        return response

    return count, collected


class _Place:
    """Which of the files in a directory a process counts in."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._taken = 0, 0  # by which process, and the file's number
        self._lock = threading.Lock()

    def number(self) -> int:
        """Return the number in the name of this process's file."""
        pid, number = self._taken
        if pid != os.getpid():  # the first call, or the first after a fork
            number = take_place(self._directory, "place")
            self._taken = os.getpid(), number
        return number

    def make_room(self) -> None:
        """Have the disk keep room for the file.

        The library counts in mapped memory. Where the disk has no room for it, the system kills who writes there.

        Raises:
            OSError: the disk is full.
        """
        with self._lock:  # else a second thread would write its zeros over what is counted by then
            file = self._directory / f"counter_{self.number()}.db"
            if file.exists():
                return
            new = file.with_suffix(".new")  # complete before others look into it
            try:
                new.write_bytes(bytes(COUNTS_BYTES))
                new.rename(file)
            except OSError:
                new.unlink(missing_ok=True)
                raise


class _OfAllWorkers:
    """Collects what all web workers have counted, one after the other in the same place included."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def collect(self) -> Iterator[Metric]:
        if self._directory.is_dir():
            yield from MultiProcessCollector(None, str(self._directory)).collect()  # type: ignore[no-untyped-call]


# What the engine tells


class EngineCollector:
    """Collects what the engine tells of the models. It starts no engine."""

    def __init__(self, application: ApplicationInterface) -> None:
        self._application = application

    def collect(self) -> Iterator[Metric]:
        is_up, overview = self._ask()
        up = "1 if the engine runs and answers; without PRELOAD_MODELS, it starts with the first request for a model"
        yield GaugeMetricFamily("fes_engine_up", up, value=float(is_up))
        yield from _states(overview)
        yield from _sums(overview)
        yield from _cache(overview)
        yield from _histograms(overview)

    def _ask(self) -> tuple[bool, Overview]:
        try:
            return True, self._application.overview(METRICS_TIMEOUT_S)
        except ModelUnavailable:
            return False, [{"model": name, "state": "stopped"} for name in self._application.list_models()]
        except DeadlineExceeded:
            return False, []


def _states(overview: Overview) -> Iterator[Metric]:
    states = GaugeMetricFamily("fes_model_state", "1 for the state that a model is in", labels=["model", "state"])
    for told in overview:
        for state in State:
            states.add_metric([told["model"], str(state)], float(told["state"] == state))
    yield states
    for name, meaning, key in (
        ("fes_queue_depth", "Requests that wait for a model", "queue_depth"),
        ("fes_running_requests", "Requests that a model works on", "running_jobs"),
    ):
        gauge = GaugeMetricFamily(name, meaning, labels=["model"])
        for told in overview:
            gauge.add_metric([told["model"]], told.get(key, 0))
        yield gauge
    replicas = GaugeMetricFamily(
        "fes_model_replicas", "Processes that run a model and share its queue", labels=["model"]
    )
    for told in overview:
        replicas.add_metric([told["model"]], sum(one["state"] == "running" for one in told.get("replicas", [])))
    yield replicas
    for name, meaning, key in (
        (
            "fes_model_memory_bytes",
            "Main memory of a model's processes; of models in one process, each",
            "memory_bytes",
        ),
        ("fes_model_load_seconds", "How long a model's last load took", "load_seconds"),
    ):
        gauge = GaugeMetricFamily(name, meaning, labels=["model"])
        for told in overview:
            if told.get(key) is not None:
                gauge.add_metric([told["model"]], told[key])
        yield gauge


def _sums(overview: Overview) -> Iterator[Metric]:
    for name, meaning, key in (
        ("fes_model_loads", "How often a model was loaded", "loads"),
        ("fes_model_load_failures", "How often a model failed to load", "failed_loads"),
        ("fes_model_requests", "Requests that a model accepted", "jobs"),
        ("fes_model_items", "Items of the requests that a model accepted", "items"),
        ("fes_model_failures", "Requests to a model that were answered with a 5xx", "failures"),
    ):
        counter = CounterMetricFamily(name, meaning, labels=["model"])
        for told in overview:
            counter.add_metric([told["model"]], told.get("counts", {}).get(key, 0))
        yield counter


def _cache(overview: Overview) -> Iterator[Metric]:
    """Tell of the answers that are kept, if any are (RESULT_CACHE_BYTES)."""
    told = [(one["model"], one["cache"]) for one in overview if "cache" in one]
    kinds = (
        (CounterMetricFamily, "hits", "Items that were answered from what is kept"),
        (CounterMetricFamily, "misses", "Items that were looked up and not found"),
        (GaugeMetricFamily, "bytes", "What the kept answers take, keys included"),
        (GaugeMetricFamily, "entries", "Items whose answers are kept"),
    )
    for kind, key, meaning in kinds if told else ():
        metric = kind(f"fes_result_cache_{key}", meaning, labels=["model"])
        for model, counts in told:
            metric.add_metric([model], counts[key])
        yield metric


def _histograms(overview: Overview) -> Iterator[Metric]:
    for name, meaning, key in (
        ("fes_queue_seconds", "How long requests waited for a model, loading included", "queue_seconds"),
        ("fes_inference_seconds", "How long calls of a model's function took", "inference_seconds"),
        ("fes_batch_items", "Items of calls of a model's function", "batch_items"),
    ):
        histogram = HistogramMetricFamily(name, meaning, labels=["model", "task"])
        for told in overview:
            for task, measured in told.get("tasks", {}).items():
                buckets, total = _cumulative(measured[key])
                histogram.add_metric([told["model"], task], buckets, total)
        yield histogram


def _cumulative(told: dict[str, Any]) -> tuple[list[tuple[str, float]], float]:
    buckets, n = [], 0
    for bound, count in zip([*map(str, map(float, told["bounds"])), "+Inf"], told["counts"], strict=True):
        n += count
        buckets.append((bound, float(n)))
    return buckets, told["sum"]


# OpenAPI


def describe_routes(application_interface: ApplicationInterface) -> dict[str, Any]:
    """Return the OpenAPI description of the routes."""

    def health(summary: str, name: str, *statuses: str) -> dict[str, Any]:
        schema = {"type": "object", "properties": {"status": {"enum": list(statuses)}}, "required": ["status"]}
        answer = json_response("It is", schema, {"status": statuses[0]})
        return operation(summary, tag=TAG, operation_id=f"monitoring_api_{name}", answer=answer)

    ready = health("Whether all of PRELOAD_MODELS have been loaded, and none has failed since", "ready", "ready")
    properties = {"status": {"const": "not ready"}, "reason": {"type": "string"}}
    ready["responses"]["503"] = json_response(
        "It is not, and why",
        {"type": "object", "properties": properties, "required": list(properties)},
        {"status": "not ready", "reason": "the model blip is loading"},
    )
    text = {"description": "Metrics in the text format of Prometheus", "content": {"text/plain": {"schema": _TEXT}}}
    return {
        "/health/live": {"get": health("Whether the server answers", "live", "live")},
        "/health/ready": {"get": ready},
        "/metrics": {"get": operation("Metrics", tag=TAG, operation_id="monitoring_api_metrics", answer=text)},
    }


_TEXT: Final = {"type": "string"}
