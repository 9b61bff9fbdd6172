"""Every error that a client can meet, with the HTTP status it is answered with.

    ServerError                     500
    ├── InvalidInput                400  the request's content is at fault; ``field`` names the place
    │   ├── NoDefault               400  neither named nor configured: which task or which model
    │   └── TooLarge                413  too many bytes, pixels, seconds or items
    ├── Unauthorized                401  the request has none of API_KEYS
    ├── ForeignOrigin               403  a page of another origin sent it, which CORS_ORIGINS does not name
    ├── UnsupportedMediaType        415  the body is of a type that the server does not take
    ├── NotFound                    404
    │   ├── TaskNotFound            404
    │   ├── ModelNotFound           404
    │   └── TaskNotSupported        404  the model does not implement the task
    ├── QueueFull                   429  the model's queue is full; ``retry_after`` seconds
    ├── RateLimited                 429  more requests than RATE_LIMIT allows; ``retry_after`` seconds
    ├── ModelError                  500  the model's function raised or broke the task's contract
    ├── ModelUnavailable            503  the model's consumer died, or the model was stopped
    │   └── ModelLoadFailed         503  ``load_model`` raised
    ├── DeadlineExceeded            504  no answer within REQUEST_TIMEOUT
    └── ClientDisconnected          499  nobody is there to read the answer; the job is dropped

Each takes one readable sentence. They survive pickling, because they cross processes.
"""

from __future__ import annotations


class ServerError(Exception):
    """An error with a sentence for the client, an HTTP status and a stable code."""

    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, field: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after = retry_after

    def body(self) -> dict[str, str]:
        """Return what a client is told."""
        told = {"error": self.message, "code": self.code} | ({} if self.field is None else {"field": self.field})
        # Half surrogate pairs, which a client's keys may hold but no answer can, are spelt out.
        return {name: text.encode("utf-8", "backslashreplace").decode() for name, text in told.items()}

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.field, self.retry_after)


def _rebuild(kind: type[ServerError], message: str, field: str | None, retry_after: float | None) -> ServerError:
    return kind(message, field=field, retry_after=retry_after)


class InvalidInput(ServerError):
    status = 400
    code = "invalid_input"


class NoDefault(InvalidInput):
    code = "no_default"


class TooLarge(InvalidInput):
    status = 413
    code = "too_large"


class Unauthorized(ServerError):
    status = 401
    code = "unauthorized"


class ForeignOrigin(ServerError):
    status = 403
    code = "foreign_origin"


class UnsupportedMediaType(ServerError):
    status = 415
    code = "unsupported_media_type"


class NotFound(ServerError):
    status = 404
    code = "not_found"


class TaskNotFound(NotFound):
    code = "task_not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class TaskNotSupported(NotFound):
    code = "task_not_supported"


class QueueFull(ServerError):
    status = 429
    code = "queue_full"


class RateLimited(ServerError):
    status = 429
    code = "rate_limited"


class ModelError(ServerError):
    code = "model_error"


class ModelUnavailable(ServerError):
    status = 503
    code = "model_unavailable"


class ModelLoadFailed(ModelUnavailable):
    code = "model_load_failed"


class DeadlineExceeded(ServerError):
    status = 504
    code = "deadline_exceeded"


class ClientDisconnected(ServerError):
    status = 499
    code = "client_disconnected"


class SettingError(Exception):
    """A setting's value is not allowed. The message is one line for whoever started the server."""


def too_late(model: str) -> DeadlineExceeded:
    """Return the error of a request that its model has not answered before its deadline."""
    return DeadlineExceeded(f"the model {model} gave no answer in time (REQUEST_TIMEOUT)")
