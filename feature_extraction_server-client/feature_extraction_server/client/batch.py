"""Many requests, their results in order, and a progress bar."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, Self

from tqdm import tqdm

from feature_extraction_server.client.client import Client, Outcome
from feature_extraction_server.client.errors import FesError, Unreachable
from feature_extraction_server.client.items import Item
from feature_extraction_server.client.show import printable, show, show_meta

#: Errors that are not one input's: every other request would meet them too.
_EVERYONES_STATUSES: Final = (401, 403, 404, 405)
_EVERYONES_CODES: Final = ("no_default", "model_load_failed")


def run_batch(
    client: Client,
    options: argparse.Namespace,
    task: str,
    items: Sequence[Item],
    classes: Sequence[str] | None = None,
    then: Callable[[Item, Any], None] | None = None,
) -> int:
    """Run a task on all items, write each result as soon as it is its turn, and return the exit status.

    An item that fails does not stop the others, unless all of them would fail as it did.

    Args:
        classes: what the numbers of a result stand for, where it is shown.
        then: called with each item and its result. An OSError or ValueError that it raises is the item's error.

    Raises:
        Unreachable: there is no server to ask.
    """
    inputs = (item.inputs for item in items)
    outcomes = client.run_many(task, inputs, options.model, options.concurrency, options.meta)
    n_failed = 0
    with contextlib.closing(outcomes), _Output(options.json, len(items), classes) as output:
        for item, outcome in zip(items, outcomes, strict=False):
            if isinstance(outcome.error, Unreachable):
                raise outcome.error
            error = outcome.error or _call(then, item, outcome)
            output.write(item, outcome, error)
            n_failed += error is not None
            if _is_everyones(error):
                break
    return int(n_failed > 0)


def _call(then: Callable[[Item, Any], None] | None, item: Item, outcome: Outcome) -> Exception | None:
    try:
        if then is not None:
            then(item, outcome.result)
    except (OSError, ValueError) as error:
        return error
    return None


def _is_everyones(error: Exception | None) -> bool:
    return isinstance(error, FesError) and (error.status in _EVERYONES_STATUSES or error.code in _EVERYONES_CODES)


class _Output:
    """Results on standard output, errors and the progress bar on standard error."""

    def __init__(self, as_json: bool, n_items: int, classes: Sequence[str] | None) -> None:
        self._as_json = as_json
        self._n_items = n_items
        self._classes = classes
        hidden = n_items < 2 or not sys.stderr.isatty()
        self._bar = tqdm(total=n_items, file=sys.stderr, disable=hidden, unit="", dynamic_ncols=True, leave=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def write(self, item: Item, outcome: Outcome, error: Exception | None) -> None:
        """Write what became of one item; an error, if there is one, which need not be the outcome's."""
        with self._bar.external_write_mode(file=sys.stdout):  # the bar makes room where it is on the same terminal
            if self._as_json:
                answer = _answer_object(outcome) if error is None else _error_object(error, item)
                sys.stdout.write(json.dumps(item.labels | answer, ensure_ascii=False) + "\n")
            elif error is None:
                text = show(outcome.result, self._classes)
                if outcome.meta is not None:
                    text += f"\n{show_meta(outcome.meta)}"
                sys.stdout.write(self._headed(item, text) + "\n")
            sys.stdout.flush()
            if error is not None:
                message = _error_object(error, item)["error"]
                sys.stderr.write(printable(f"fes: {item.name}: {message}" if item.labels else f"fes: {message}") + "\n")
        self._bar.update()

    def _headed(self, item: Item, text: str) -> str:
        if self._n_items == 1:
            return text
        return f"{printable(item.name)}:{chr(10) if chr(10) in text else ' '}{text}"


def _answer_object(outcome: Outcome) -> dict[str, Any]:
    return {"result": outcome.result} | ({} if outcome.meta is None else {"meta": outcome.meta})


def _error_object(error: Exception, item: Item) -> dict[str, Any]:
    if isinstance(error, FesError):
        told = {"error": error.message, "code": error.code, "status": error.status, "field": error.field}
        return {key: value for key, value in told.items() if value is not None}
    reason = getattr(error, "strerror", None) or str(error)
    file = getattr(error, "filename", None)
    return {"error": reason if file is None or str(file) in item.name else f"{file}: {reason}", "code": "file_error"}
