"""Traces in OpenTelemetry, received by a collector in this process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.conftest import PLUGIN_PATH, Server, free_port
from tests.waiting import TIMEOUT_S

pytestmark = pytest.mark.process

StartServer = Callable[..., Server]

ECHO = "/api/tasks/fake_shout/models/fake_echo/features"
TWO = ("-w", "2", "--worker-class", "gthread", "--threads", "8", "--preload")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Receives spans at ``url``."""

    def __init__(self) -> None:
        self.received: queue.SimpleQueue[tuple[dict[str, Any], Any]] = queue.SimpleQueue()
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    about = {one.key: one.value.string_value for one in resource.resource.attributes}
                    for scope in resource.scope_spans:
                        for span in scope.spans:
                            received.put((about, span))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.server.shutdown()
    thread.join(TIMEOUT_S)
    made.server.server_close()


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def span_of(collector: Collector, request_id: str) -> tuple[dict[str, Any], Any]:
    while True:
        about, span = collector.received.get(timeout=TIMEOUT_S)
        if attributes(span)["fes.request_id"] == request_id:
            return about, span


def test_request_is_a_span_of_the_trace_that_it_came_with(gunicorn: StartServer, collector: Collector) -> None:
    server = gunicorn(*TWO, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, OTEL_BSP_SCHEDULE_DELAY="20")
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-ID": "who"}

    requests.post(server.url + ECHO, json={"text": "hi"}, headers=headers, timeout=60)

    about, span = span_of(collector, "who")
    told = attributes(span)
    assert about["service.name"] == "feature-extraction-server"
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.name == "POST /api/tasks/<task>/models/<model>/features"
    assert (told["fes.task"], told["fes.model"], told["http.response.status_code"]) == ("fake_shout", "fake_echo", 200)
    took_s = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    assert 0 < told["fes.queued_seconds"] + told["fes.computed_seconds"] <= took_s


def test_failure_is_an_error_in_a_trace_of_its_own(gunicorn: StartServer, collector: Collector) -> None:
    server = gunicorn(*TWO, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=collector.url, OTEL_BSP_SCHEDULE_DELAY="20")
    headers = {"traceparent": "garbage", "X-Request-ID": "who"}

    requests.post(server.url + ECHO, json={"text": "crash"}, headers=headers, timeout=60)

    _, span = span_of(collector, "who")
    assert span.status.code == 2  # an error
    assert span.parent_span_id == b""


def test_collector_that_cannot_be_reached_harms_nobody(gunicorn: StartServer) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    server = gunicorn(*TWO, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, OTEL_EXPORTER_OTLP_TIMEOUT="1")

    assert [server.post(ECHO, {"text": "hi"}).json() for _ in range(3)] == ["HI!"] * 3


def test_server_without_the_packages_says_so_and_works(gunicorn: StartServer, tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "opentelemetry" / "__init__.py"
    missing.parent.mkdir(parents=True)
    missing.write_text("raise ImportError('no such package')")
    path = ":".join([str(tmp_path / "missing"), *PLUGIN_PATH])

    server = gunicorn(*TWO, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9", PYTHONPATH=path)

    assert server.post(ECHO, {"text": "hi"}).json() == "HI!"
    assert "Nothing is traced" in (tmp_path / "log.txt").read_text()
