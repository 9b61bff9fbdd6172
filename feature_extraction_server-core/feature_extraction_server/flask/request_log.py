"""Request ids, the times of a request in its answer, and the access log.

This lies around the whole app rather than in hooks of Flask's, which would cost each request several times as much.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, Final
from urllib.parse import quote

from feature_extraction_server.core.tracking import RequestRecord, current, is_id, new_id
from feature_extraction_server.flask.tracing import Trace

logger = logging.getLogger("feature_extraction_server.access")

_MAX_PATH: Final = 300

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def with_request_log(app: Wsgi, *, log_access: bool, trace: Trace | None) -> Wsgi:
    """Return ``app`` with an id for each request, and the headers ``X-Request-ID`` and, where a model ran,
    ``Server-Timing`` and, where answers are kept, ``Cache-Status`` in its answer.

    Args:
        log_access: whether each request is logged, too.
        trace: takes each request's record, its environment and its answer's status.
    """

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        given = environ.get("HTTP_X_REQUEST_ID")
        record = RequestRecord(given if given is not None and is_id(given) else new_id(), environ.get("HTTP_ORIGIN"))

        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            headers.append(("X-Request-ID", record.id))
            if (times := record.times) is not None:
                queued, computed = 1000 * times.queued_s, 1000 * times.computed_s
                headers.append(("Server-Timing", f"queue;dur={queued:.3f}, compute;dur={computed:.3f}"))
            if record.cache_status is not None:
                headers.append(("Cache-Status", record.cache_status))
            if log_access:
                _log(record, environ, status)
            if trace is not None:
                trace(record, environ, status)
            return start_response(status, headers, *error)

        current.set(record)
        try:
            return app(environ, start)
        finally:
            current.set(None)

    return answer


def _log(record: RequestRecord, environ: dict[str, Any], status: str) -> None:
    """Log a request: no query and no body, which hold what clients sent."""
    path = environ["PATH_INFO"].encode("latin-1", "replace")[:_MAX_PATH]
    told: dict[str, str | int | float] = {
        "method": environ["REQUEST_METHOD"][:20],
        "path": quote(path, safe="/<>:@!$&'()*+,;="),  # a line break in it cannot forge a line
        "status": int(status[:3]),
        "seconds": round(time.monotonic() - record.began, 6),
    }
    if record.task is not None and record.model is not None:
        told |= {"task": record.task, "model": record.model}
    if (times := record.times) is not None:
        told |= {
            "items": times.n_items,
            "batch_items": times.batch_items,
            "queued_seconds": round(times.queued_s, 6),
            "computed_seconds": round(times.computed_s, 6),
        }
    rest = " ".join(f"{name}={value}" for name, value in list(told.items())[3:])
    logger.info("%s %s %d %s", told["method"], told["path"], told["status"], rest, extra={"fields": told})
