"""Every error that the client raises.

    FesError
    ├── ServerError         the server answered with an error; ``status`` is its HTTP status
    └── ConnectionFailed    there is no answer
        ├── Unreachable     nobody listens there, or there is no such host
        └── TimedOut        the server took longer than the client's timeout

A file that cannot be read is an OSError, as always.
"""

from __future__ import annotations


class FesError(Exception):
    """An error with a sentence for people.

    Attributes:
        message: what went wrong; the server's own sentence where the server answered.
        code: a stable name, as ``queue_full``; the server's own where it answered.
        status: the HTTP status, or None where there is no answer.
        field: the key of the input that is at fault (as ``image[1]``), or None.
    """

    code = "error"

    def __init__(
        self, message: str, *, code: str | None = None, status: int | None = None, field: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        self.status = status
        self.field = field


class ServerError(FesError):
    """The server answered with an error."""

    code = "unexpected_answer"


class ConnectionFailed(FesError):
    """The connection broke before there was an answer."""

    code = "connection_failed"


class Unreachable(ConnectionFailed):
    """No connection could be made."""

    code = "unreachable"


class TimedOut(ConnectionFailed):
    """The server took longer than the client's timeout."""

    code = "timed_out"
