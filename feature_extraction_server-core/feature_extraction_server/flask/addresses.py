"""Where requests go, found once for each address.

To find the route for a path, and what else there is to a request's URL, takes Flask and Werkzeug a fifth of their time
for a short request. Clients ask for few addresses, and for those again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from flask import Request
from werkzeug.routing import MapAdapter

MAX_ADDRESSES: Final = 256
#: All of a request that it depends on where it goes.
_KEY: Final = (
    "REQUEST_METHOD",
    "PATH_INFO",
    "QUERY_STRING",
    "SCRIPT_NAME",
    "HTTP_HOST",
    "SERVER_NAME",
    "SERVER_PORT",
    "wsgi.url_scheme",
    "HTTP_CONNECTION",
    "HTTP_UPGRADE",
)


class Address(MapAdapter):
    """A URL adapter that serves for all requests to one address, and looks for their route once.

    Args:
        found: the one that Flask has made for the first of them.
        host: the request's, as it was found on the way.
    """

    def __init__(self, found: MapAdapter, host: str) -> None:
        vars(self).update(vars(found))
        self.host = host
        self._route: tuple[Any, Mapping[str, Any]] | None = None

    def match(self, *args: Any, **options: Any) -> tuple[Any, Mapping[str, Any]]:
        if args or options != {"return_rule": True}:
            return super().match(*args, **options)
        if self._route is None:
            self._route = super().match(return_rule=True)
        rule, arguments = self._route
        return rule, dict(arguments)


class Addresses:
    """The addresses that were asked for of late. For any number of threads, once all routes are there."""

    def __init__(self) -> None:
        self._known: dict[tuple[str | None, ...], Address] = {}

    def __len__(self) -> int:
        return len(self._known)

    def of(self, request: Request, find: Callable[[Request], MapAdapter | None]) -> Address:
        """Return a request's address, by ``find`` where it is not known."""
        key = tuple(map(request.environ.get, _KEY))
        address = self._known.get(key)
        if address is None:
            found = find(request)
            assert found is not None
            address = Address(found, request.host)
            if len(self._known) >= MAX_ADDRESSES:  # clients may ask for anything
                self._known.clear()
            self._known[key] = address
        request.host = address.host
        return address
