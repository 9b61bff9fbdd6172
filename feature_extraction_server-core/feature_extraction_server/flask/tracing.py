"""Traces in OpenTelemetry: a span for each request, sent where OpenTelemetry's own environment variables say."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any, Final

from feature_extraction_server.core.application import ApplicationInterface
from feature_extraction_server.core.tracking import RequestRecord

logger = logging.getLogger(__name__)

#: Either says where spans are sent; without them, there are none.
ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
SERVICE: Final = "feature-extraction-server"

Trace = Callable[[RequestRecord, dict[str, Any], str], None]


def tracing(application: ApplicationInterface) -> Trace | None:
    """Return what makes a span of a request that is about to be answered: its record, WSGI environment and status.

    None where nothing is to be traced. Where the packages for it are missing, the log says so.
    """
    is_off = (
        os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    )
    if is_off or not any(map(os.environ.get, ENDPOINTS)):
        return None
    try:
        from opentelemetry import propagate, trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        logger.warning("Nothing is traced: install feature_extraction_server-core[otel] (%s)", error)
        return None
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = TracerProvider(resource=Resource.create({} if named else {"service.name": SERVICE}))
    # It has a thread, which a fork would not take along.
    application.in_each_worker(lambda: provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter())))
    tracer = provider.get_tracer(SERVICE)

    def make_span(record: RequestRecord, environ: dict[str, Any], status: str) -> None:
        ended = time.time_ns()
        began = ended - round(1e9 * (time.monotonic() - record.began))
        names = {"traceparent": "HTTP_TRACEPARENT", "tracestate": "HTTP_TRACESTATE", "baggage": "HTTP_BAGGAGE"}
        parent = propagate.extract({name: environ[key] for name, key in names.items() if key in environ})
        attributes = _attributes(record, environ, int(status[:3]))
        name = " ".join(str(attributes[key]) for key in ("http.request.method", "http.route") if key in attributes)
        span = tracer.start_span(name, parent, trace.SpanKind.SERVER, attributes, start_time=began)
        if status >= "500":
            span.set_status(trace.StatusCode.ERROR)
        span.end(ended)

    return make_span


def _attributes(record: RequestRecord, environ: dict[str, Any], status: int) -> dict[str, str | int | float]:
    asked = environ.get("werkzeug.request")
    rule = getattr(asked, "url_rule", None)
    attributes: dict[str, str | int | float] = {
        "http.request.method": environ["REQUEST_METHOD"][:20],
        "http.response.status_code": status,
        "fes.request_id": record.id,
    }
    if rule is not None:
        attributes["http.route"] = rule.rule
    if record.task is not None and record.model is not None:
        attributes |= {"fes.task": record.task, "fes.model": record.model}
    if (times := record.times) is not None:
        attributes |= {
            "fes.items": times.n_items,
            "fes.batch_items": times.batch_items,
            "fes.queued_seconds": times.queued_s,
            "fes.computed_seconds": times.computed_s,
        }
    return attributes
