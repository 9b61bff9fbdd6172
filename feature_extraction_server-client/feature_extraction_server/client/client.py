"""The Python client: the server's functions as methods, and many requests at a time."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    LocationParseError,
    MaxRetryError,
    NameResolutionError,
    NewConnectionError,
    ReadTimeoutError,
)

from feature_extraction_server.client.errors import ConnectionFailed, FesError, ServerError, TimedOut, Unreachable
from feature_extraction_server.client.features import Features
from feature_extraction_server.client.media import form_body, has_files, json_body, read_files

#: Longer than the server's own REQUEST_TIMEOUT (600 s), so that its error comes first.
DEFAULT_TIMEOUT_S: Final = 630.0
CONNECT_TIMEOUT_S: Final = 10.0
MAX_RETRY_AFTER_S: Final = 30
#: As long as a socket can wait: it counts milliseconds in 31 bits.
MAX_TIMEOUT_S: Final = 2_147_483.0
#: Twice what one call of a model takes by default (MAX_BATCH_SIZE): while one batch runs, the next one fills.
DEFAULT_CONCURRENCY: Final = 64

# So much is sent at a time, each within the connection's timeout.
_BLOCK_BYTES: Final = 1 << 18


@dataclass(frozen=True)
class Outcome:
    """What became of one of many requests: its result, or the error in its place.

    ``meta`` says where the result comes from, as ``Client.run_with_meta`` returns it; None unless it was asked for.
    """

    result: Any = None
    error: FesError | OSError | None = None
    meta: dict[str, Any] | None = None


class _Retry(urllib3.Retry):
    """When to send again: as the server says, but not where a model cannot be loaded, which each request would try."""

    def increment(
        self,
        method: str | None = None,
        url: str | None = None,
        response: urllib3.BaseHTTPResponse | None = None,
        *others: Any,
        **named: Any,
    ) -> Self:
        if response is not None and _code_of(response) == "model_load_failed":
            raise MaxRetryError(named["_pool"], url)  # urllib3 then returns the answer
        return super().increment(method, url, response, *others, **named)


class Client(Features):
    """A feature extraction server. One client may be used from many threads.

    Args:
        url: where the server is, as ``http://localhost:5000``; its path, if any, comes before every route.
        api_key: sent with every request as a bearer token. Spaces and line ends around it are none of it.
        timeout: seconds to wait for an answer, 24 days at most.
        retries: how often a request is sent again where the server says when to come back (429 and 503 with
            Retry-After; at most 30 seconds are waited each time). A model that cannot be loaded is asked for once.

    Raises:
        ValueError: the URL is none, or the key has characters that are not printable ASCII.
    """

    def __init__(
        self,
        url: str = "http://localhost:5000",
        api_key: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
        retries: int = 5,
    ) -> None:
        self.url: Final = (url if "://" in url else f"http://{url}").rstrip("/")
        try:
            parsed = urllib3.util.parse_url(self.url)
        except LocationParseError:
            parsed = urllib3.util.Url()
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"{url!r} is not the URL of a server; one is http://localhost:5000")
        self._headers = {"User-Agent": "feature_extraction_server-client", "Accept": "application/json"}
        if key := (api_key or "").strip():
            if not (key.isascii() and key.isprintable()):
                raise ValueError("the API key has characters that no header can have")
            self._headers["Authorization"] = f"Bearer {key}"
        self._timeout = timeout = min(timeout, MAX_TIMEOUT_S)
        self._pool = urllib3.PoolManager(
            maxsize=DEFAULT_CONCURRENCY,
            blocksize=_BLOCK_BYTES,
            timeout=urllib3.Timeout(connect=min(CONNECT_TIMEOUT_S, timeout), read=timeout),
            retries=_Retry(
                total=retries,
                connect=False,
                read=False,
                redirect=False,
                allowed_methods=None,
                raise_on_status=False,
                retry_after_max=MAX_RETRY_AFTER_S,
                backoff_jitter=0.1,
            ),
        )
        self._takes_forms = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()

    # What there is

    def list_tasks(self) -> list[str]:
        """Return the names of all tasks."""
        return self._get("tasks", "list")  # type: ignore[no-any-return]

    def list_models(self) -> list[str]:
        """Return the names of all models."""
        return self._get("models", "list")  # type: ignore[no-any-return]

    def tasks_of(self, model: str) -> list[str]:
        """Return the tasks that a model implements."""
        return self._get("models", model, "tasks", "list")  # type: ignore[no-any-return]

    def models_for(self, task: str) -> list[str]:
        """Return the models that implement a task."""
        return self._get("tasks", task, "models", "list")  # type: ignore[no-any-return]

    def describe_task(self, task: str) -> dict[str, Any]:
        """Return what a task does, and the JSON schemas of its input and its answer."""
        return self._get("tasks", task)  # type: ignore[no-any-return]

    def plugins(self) -> list[dict[str, Any]]:
        """Return kind, name, state and error of every plugin."""
        return self._get("plugins")  # type: ignore[no-any-return]

    def status(self, model: str) -> dict[str, Any]:
        """Return a model's state, queue depth and what else the server tells."""
        return self._get("models", model, "status")  # type: ignore[no-any-return]

    def start(self, model: str) -> None:
        """Start a model. Returns at once; a request would start it too."""
        self._request("POST", "models", model, "start")

    def stop(self, model: str) -> None:
        """Stop a model. Returns at once; what it has accepted is finished."""
        self._request("POST", "models", model, "stop")

    # Requests

    def run(self, task: str, model: str | None = None, **inputs: Any) -> Any:
        """Run a task and return its result.

        Args:
            task: the task's name.
            model: the model's name, or None for the task's default one.
            inputs: the task's input. Media are paths (``pathlib.Path``), bytes, binary files or pictures of Pillow's;
                a string is sent as it is. A list in a batch field gives a list of results.

        Raises:
            FesError: any of ``errors``.
            OSError: a file cannot be read.
        """
        return self._run(task, model, inputs)

    def run_with_meta(self, task: str, model: str | None = None, **inputs: Any) -> tuple[Any, dict[str, Any]]:
        """Run a task as ``run`` does, and return its result and where that comes from.

        Returns:
            the result, and a dict with the task and model, the ``checkpoint`` (the weights) with its ``revision``,
            ``dtype``, ``device`` and more. Vectors are comparable where checkpoint, revision and dtype are the same.
        """
        answer = self._ask(task, model, inputs, meta=True)
        return answer["result"], answer["meta"]

    def run_many(
        self,
        task: str,
        inputs: Iterable[Mapping[str, Any]],
        model: str | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        meta: bool = False,
    ) -> Generator[Outcome, None, None]:
        """Run a task on many inputs, ``concurrency`` of them at a time, and yield the outcomes in the inputs' order.

        An input is a dict of what ``run`` takes as keyword arguments. Inputs are taken, and files read, only as
        requests get free. An input that fails does not keep the others from running. With ``meta``, each outcome has
        what ``run_with_meta`` returns besides the result.
        """

        def run(one: Mapping[str, Any]) -> Outcome:
            try:
                answer = self._ask(task, model, one, meta=meta)
                return Outcome(answer["result"], meta=answer["meta"]) if meta else Outcome(answer)
            except (FesError, OSError) as error:
                return Outcome(error=error)

        running: deque[Future[Outcome]] = deque()
        pool = ThreadPoolExecutor(concurrency, thread_name_prefix="fes")
        try:
            for one in inputs:
                running.append(pool.submit(run, one))
                # Others may be done before the first one is: so that they do not keep the threads idle, a few more.
                while running[0].done() or len(running) >= 2 * concurrency:
                    yield running.popleft().result()
                    if not running:
                        break
            while running:
                yield running.popleft().result()
        finally:
            # Whoever gives up the outcomes does not wait for the requests that run.
            pool.shutdown(wait=False, cancel_futures=True)

    # HTTP

    def _run(self, task: str, model: str | None, inputs: Mapping[str, Any]) -> Any:
        return self._ask(task, model, inputs)

    def _ask(self, task: str, model: str | None, inputs: Mapping[str, Any], *, meta: bool = False) -> Any:
        query = "?meta=1" if meta else ""
        route = ["tasks", task, *(["models", model] if model else []), "features"]
        files = read_files({key: value for key, value in inputs.items() if value is not None})
        if self._takes_forms and has_files(files):
            try:
                return self._request("POST", *route, query=query, body=form_body(files))
            except UnicodeEncodeError:
                pass  # bytes of a command line that are no text: JSON can spell them, and the server says what is wrong
            except ServerError as error:
                if error.status != 415:
                    raise
                self._takes_forms = False  # a server that takes JSON alone
        return self._request("POST", *route, query=query, body=json_body(files))

    def _get(self, *route: str) -> Any:
        return self._request("GET", *route)

    def _request(self, method: str, *route: str, query: str = "", body: tuple[bytes, str] | None = None) -> Any:
        url = "/".join([self.url, "api", *(quote(part, safe="", errors="replace") for part in route)]) + query
        content, content_type = body or (b"", "")
        headers = self._headers | {"Content-Length": str(len(content)), "Content-Type": content_type}
        response = self._send(method, url, content, headers if body else self._headers)
        try:
            answer = response.json()
        except ValueError:
            raise _error_of(response, None) from None
        if response.status >= 300:
            raise _error_of(response, answer)
        return answer

    def _send(self, method: str, url: str, content: bytes, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        for last_try in (False, True):
            try:
                # In blocks, because the whole of a long body would have to be sent within one timeout.
                return self._pool.request(method, url, body=io.BytesIO(content) if content else None, headers=headers)
            except (NewConnectionError, NameResolutionError, ConnectTimeoutError) as error:
                raise Unreachable(f"no server can be reached at {self.url}: {_reason(error)}") from None
            except ReadTimeoutError:
                raise TimedOut(f"the server at {self.url} gave no answer within {self._timeout:g} seconds") from None
            except HTTPError as error:
                # A server may close an idle connection at the moment it is used again: once more, on a new one.
                if last_try:
                    raise ConnectionFailed(f"the connection to {self.url} broke: {_reason(error)}") from None
        raise AssertionError("unreachable")


def _code_of(response: urllib3.BaseHTTPResponse) -> Any:
    try:
        answer = response.json()
    except ValueError:
        return None
    return answer.get("code") if isinstance(answer, dict) else None


def _error_of(response: urllib3.BaseHTTPResponse, answer: Any) -> ServerError:
    if isinstance(answer, dict) and isinstance(answer.get("error"), str):
        return ServerError(answer["error"], code=answer.get("code"), status=response.status, field=answer.get("field"))
    answered = f"{response.status} {response.reason or ''}".strip()
    if location := response.headers.get("Location"):
        answered += f", a redirect to {location}"
    return ServerError(f"what answers is no feature extraction server: {answered}", status=response.status)


def _reason(error: Exception) -> str:
    """Return what the operating system said, without the library's words around it."""
    cause: BaseException = error
    while cause.__cause__ or cause.__context__:
        cause = cause.__cause__ or cause.__context__ or cause
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
