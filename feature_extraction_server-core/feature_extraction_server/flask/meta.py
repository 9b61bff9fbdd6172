"""What an answer tells of itself where its client asks for it: where it comes from, and how long it took.

A client asks by ``?meta=1`` or, as of RFC 7240, by the header ``Prefer: return=meta``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from flask import Response, jsonify, request
from werkzeug.http import parse_list_header

from feature_extraction_server.core.application import ApplicationInterface
from feature_extraction_server.core.errors import InvalidInput
from feature_extraction_server.core.provenance import meta_of
from feature_extraction_server.core.tracking import current
from feature_extraction_server.flask.openapi import JsonObject, query_parameter

PARAMETER: Final = "meta"
PREFERENCE: Final = "return=meta"

# As OpenAPI describes it
_STRING_OR_NULL: Final = {"type": ["string", "null"]}
PROVENANCE_PROPERTIES: Final[JsonObject] = {
    "checkpoint": _STRING_OR_NULL | {"description": "The name of the weights"},
    "revision": _STRING_OR_NULL | {"description": "Their commit on the hub or their version; `local` for a folder"},
    "dtype": _STRING_OR_NULL | {"description": "The precision in which the model runs"},
    "device": _STRING_OR_NULL | {"description": "Where it runs"},
}
_META_PROPERTIES: Final[JsonObject] = {
    "task": {"type": "string"},
    "model": {"type": "string"},
    **PROVENANCE_PROPERTIES,
    "plugin_version": _STRING_OR_NULL,
    "queued_seconds": {"type": "number", "description": "Until the model was called, loading included"},
    "computed_seconds": {"type": "number", "description": "From then until its last call had ended"},
}
META_SCHEMA: Final[JsonObject] = {
    "type": "object",
    "properties": _META_PROPERTIES,
    "required": list(_META_PROPERTIES),
}
META_PARAMETER: Final = query_parameter(
    PARAMETER,
    "Whether the answer tells where it comes from: `1` or `true`, `0` or `false`",
    {"enum": ["0", "1", "false", "true"]},
)
PREFER_HEADER: Final[JsonObject] = {
    "name": "Prefer",
    "in": "header",
    "required": False,
    "description": f"`{PREFERENCE}` is the same as `meta=1`",
    "schema": {"type": "string", "examples": [PREFERENCE]},
}

_VALUES: Final = {"1": True, "true": True, "0": False, "false": False}


def wants_meta() -> bool:
    """Tell whether the current request asks for it. What the query says counts for more than the header.

    Raises:
        InvalidInput: the query says neither yes nor no.
    """
    environ = request.environ
    if PARAMETER in environ.get("QUERY_STRING", "") and (given := request.args.getlist(PARAMETER)):
        value = _VALUES.get(given[0].lower())
        if value is None or len(given) > 1:
            shown = ", ".join(given)[:40].encode("utf-8", "replace").decode()
            raise InvalidInput(f"meta must be 0, 1, true or false, not {shown!r}", field=PARAMETER)
        return value
    return "HTTP_PREFER" in environ and _is_preferred(environ["HTTP_PREFER"])


def with_meta(application: ApplicationInterface, run: Callable[[], Any]) -> Response:
    """Return the current request's answer, with what it tells of itself.

    Args:
        run: gives the task's result, by ``application.run`` on this thread.
    """
    record = current.get()
    assert record is not None
    record.wants_origin = True
    result = run()
    response = jsonify({"result": result, "meta": meta_of(application, record)})
    if _is_preferred(request.headers.get("Prefer", "")):
        response.headers["Preference-Applied"] = PREFERENCE
    return response


def _is_preferred(header: str) -> bool:
    """Tell whether the first preference for what to return, which is the one that counts, is this one."""
    for preference in parse_list_header(header):
        name, _, value = preference.partition(";")[0].partition("=")
        if name.strip().lower() == "return":
            return value.strip().strip('"').lower() == "meta"
    return False
