"""Who may ask: API keys, pages of other origins, and how often."""

from __future__ import annotations

import hmac
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from flask import Flask, Response, g, request

from feature_extraction_server.core.errors import ForeignOrigin, RateLimited, Unauthorized
from feature_extraction_server.core.server_settings import ServerSettings

#: What a supervisor asks, which has no key and must not be kept waiting.
HEALTH: Final = "/health/"
ANY_ORIGIN: Final = "*"
_SAFE_METHODS: Final = frozenset(("GET", "HEAD", "OPTIONS"))
_EXPOSED_HEADERS: Final = "X-Request-ID, Server-Timing, Retry-After, Location, Cache-Status, Preference-Applied"
_PREFLIGHT_SECONDS: Final = 600
_MAX_BUCKETS: Final = 10_000


def add_access_control(app: Flask, settings: ServerSettings) -> None:
    """Do what CORS_ORIGINS, API_KEYS and RATE_LIMIT say, as far as they are set."""
    origins, keys, rate = settings.cors_origins(), settings.api_keys(), settings.rate_limit.get()
    if origins:
        _allow_origins(app, origins)
    if keys:
        _require_key(app, keys)
    if rate:
        _limit_rate(app, RateLimiter(rate, settings.rate_limit_burst.get()))


# Pages of other origins


def _allow_origins(app: Flask, origins: frozenset[str]) -> None:
    def is_allowed(origin: str | None) -> bool:
        return origin is not None and (ANY_ORIGIN in origins or origin in origins)

    def answer_preflight() -> Response | None:
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return None
        response = Response(status=204)
        if is_allowed(request.headers.get("Origin")):
            response.headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE"
            response.headers["Access-Control-Allow-Headers"] = request.headers.get("Access-Control-Request-Headers", "")
            response.headers["Access-Control-Max-Age"] = str(_PREFLIGHT_SECONDS)
        return response

    def allow(response: Response) -> Response:
        origin = request.headers.get("Origin")
        if ANY_ORIGIN in origins:
            response.headers["Access-Control-Allow-Origin"] = ANY_ORIGIN
        else:
            response.vary.add("Origin")
        if origin is not None and is_allowed(origin):
            response.headers.setdefault("Access-Control-Allow-Origin", origin)
            response.headers["Access-Control-Expose-Headers"] = _EXPOSED_HEADERS
        return response

    app.before_request(answer_preflight)
    app.after_request(allow)


def refuse_foreign_page(origin: str, origins: frozenset[str]) -> None:
    """Refuse what a page of another origin has a visitor's browser send.

    Browsers send forms and plain bodies without asking first, so that any page could use a server that only its
    visitor can reach. A page can forge none of the headers that are looked at here.

    Args:
        origin: of the page that sent the current request.
        origins: those whose pages may.

    Raises:
        ForeignOrigin: it may not.
    """
    if request.method in _SAFE_METHODS:
        return
    environ = request.environ
    if ANY_ORIGIN in origins or origin in origins or environ.get("HTTP_SEC_FETCH_SITE") == "same-origin":
        return
    forwarded = environ.get("HTTP_X_FORWARDED_HOST", "").partition(",")[0].strip()
    if origin.partition("://")[2].lower() in {environ.get("HTTP_HOST", "").lower(), forwarded.lower()} - {""}:
        return
    raise ForeignOrigin(f"pages of {origin[:200]} may not use this server (CORS_ORIGINS)")


# API keys


def _require_key(app: Flask, keys: Sequence[str]) -> None:
    encoded = [key.encode() for key in keys]

    def check() -> None:
        if _is_for_everybody(app):
            return
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        token = given.strip().encode()
        # All of them, so that the time tells nothing of which key it was like.
        found = [number for number, key in enumerate(encoded) if hmac.compare_digest(token, key)]
        if scheme.lower() != "bearer" or not found:
            raise Unauthorized("send one of the server's API keys, as Authorization: Bearer <key>")
        g.api_key = found[0]

    app.before_request(check)


def _is_for_everybody(app: Flask) -> bool:
    """Tell whether neither keys nor rates count: for health checks, and what its view says every visitor may have."""
    view = app.view_functions.get(request.endpoint or "")
    return request.path.startswith(HEALTH) or getattr(view, "is_public", False)


# Rates


class RateLimiter:
    """Lets everybody do so much a second, and at the beginning a number of things at once.

    Args:
        rate: how much a second.
        burst: how many at once.
    """

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = burst
        self._lock = threading.Lock()
        # When each is owed nothing any more, who asked longest ago first. Whoever is not in it is owed nothing.
        self._free_at: OrderedDict[object, float] = OrderedDict()

    def take(self, who: object, now: float) -> float:
        """Count one, if it may be; else return after how many seconds it may."""
        with self._lock:
            free_at = max(now, self._free_at.get(who, now))
            wait_s = free_at - now - (self._burst - 1) / self._rate
            # Time is counted from 0 on, in which such sums are not exact.
            if wait_s > 1e-9 * now:
                return wait_s
            self._free_at[who] = free_at + 1 / self._rate
            self._free_at.move_to_end(who)
            if len(self._free_at) > _MAX_BUCKETS:
                self._free_at.popitem(last=False)
            return 0.0


def _limit_rate(app: Flask, limiter: RateLimiter) -> None:
    def check() -> None:
        if _is_for_everybody(app):
            return
        who = g.get("api_key", request.remote_addr)
        if wait_s := limiter.take(who, time.monotonic()):
            raise RateLimited("too many requests were sent in too short a time (RATE_LIMIT)", retry_after=wait_s)

    app.before_request(check)
