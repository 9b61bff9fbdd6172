"""Files that a client names by URL, fetched without lending it this server's place in the network.

A URL's host must be one that the operator allows, and the address that is connected to must be public: the host's name
is resolved once, the addresses are checked, and the socket goes to one of those, whatever the name resolves to a moment
later. The same holds for every redirect. Bytes and seconds are bounded for all URLs of a request together.
"""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Final, TypeGuard

from feature_extraction_server.core.cut_off import cut_off
from feature_extraction_server.core.errors import DeadlineExceeded, InvalidInput, TooLarge
from feature_extraction_server.core.turns import waiting

MAX_REDIRECTS: Final = 5
MAX_AT_ONCE: Final = 8
_CHUNK_BYTES: Final = 1 << 16
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_URL: Final = re.compile(r"\s*[a-z][a-z0-9+.-]{0,30}://", re.IGNORECASE)
_MAX_HOST_LENGTH: Final = 253
_HOST_NAME: Final = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?", re.IGNORECASE)
# What a URL's path and query may hold as it is; the rest is percent-encoded.
_KEPT: Final = "%/:=&?~+!$,;'@()*[]"
_HEADERS: Final = {"User-Agent": "feature-extraction-server", "Accept": "*/*", "Connection": "close"}

_GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
#: IPv6 addresses that a gateway translates to the IPv4 address in their last four bytes.
_NAT64: Final = IPv6Network("64:ff9b::/96")
#: What not every release of ``ipaddress`` knows to be special; and the address at which Azure's machines find secrets.
_NOT_PUBLIC: Final = [
    ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "2001::/23", "2002::/16", "3fff::/20")
]


def is_url(value: Any) -> TypeGuard[str]:
    """Tell whether a value is a text that begins as a URL with an authority does (``https://``, ``ftp://``)."""
    return isinstance(value, str) and _URL.match(value) is not None


def is_public(address: str) -> bool:
    """Tell whether an IP address is a public one of a single host: not private, loopback, link-local, reserved, ..."""
    ip = ip_address(address)
    if ip.version == 6:
        if ip in _NAT64:
            ip = IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip not in _GLOBAL_UNICAST:
            return False
    special = ip.is_multicast or ip.is_reserved or any(ip in network for network in _NOT_PUBLIC)
    return ip.is_global and not special


@dataclass(frozen=True)
class UrlFetcher:
    """Fetches files from the hosts that are allowed.

    Args:
        allowed_hosts: their names in lower case; ``*`` stands for every host. Where there is none, nothing is fetched.
        max_bytes: how large the files of one request may be together.
        timeout_s: how long fetching them may take together.
        may_connect: tells which IP addresses may be connected to.
    """

    allowed_hosts: frozenset[str] = frozenset()
    max_bytes: int = 256 * 1024 * 1024
    timeout_s: float = 30.0
    may_connect: Callable[[str], bool] = is_public

    @waiting()
    def fetch_all(self, urls: Mapping[str, str]) -> dict[str, bytes]:
        """Return the files that URLs lead to, both by the fields of the request that they stand in.

        Raises:
            InvalidInput: fetching is switched off, a URL or its host is not allowed, or its server gave no file.
            TooLarge: the files have more than ``max_bytes`` bytes.
            DeadlineExceeded: they took longer than ``timeout_s``.
        """
        if not self.allowed_hosts:
            field = next(iter(urls))
            raise InvalidInput(
                f"{field} is a URL, and fetching by URL is switched off: the setting ALLOWED_URL_HOSTS switches it on "
                "by naming the hosts that files may be fetched from",
                field=field,
            )
        budget = _Budget(self.max_bytes, self.timeout_s)
        if len(urls) == 1:
            return {field: self._fetch(field, url, budget) for field, url in urls.items()}
        pool = ThreadPoolExecutor(min(len(urls), MAX_AT_ONCE), "url-fetch")
        try:
            futures = {field: pool.submit(self._fetch, field, url, budget) for field, url in urls.items()}
            ended, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            return {field: future.result() for field, future in futures.items() if future in ended}
        finally:
            # After an error the others are not waited for: they end with their next bytes, or at the deadline.
            budget.use_up()
            pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, field: str, url: str, budget: _Budget) -> bytes:
        try:
            return self._follow(url.strip(), budget)
        except _OutOfBytes:
            raise TooLarge(
                f"{field} is too large: what a request fetches by URL may have {self.max_bytes} bytes "
                "(MAX_CONTENT_LENGTH)",
                field=field,
            ) from None
        except TimeoutError:
            raise DeadlineExceeded(
                f"{field} cannot be fetched: its server did not send it in time (URL_TIMEOUT)", field=field
            ) from None
        except _NotFetched as error:
            raise InvalidInput(f"{field} cannot be fetched: {error}", field=field) from None

    def _follow(self, url: str, budget: _Budget) -> bytes:
        """Fetch a file, over as many redirects as are allowed."""
        for _ in range(MAX_REDIRECTS + 1):
            target = self._target(url)
            try:
                with self._connect(target, budget) as connection:
                    connection.request("GET", target.path, headers=_HEADERS | {"Host": target.host_header})
                    with connection.getresponse() as answer:  # which the socket now belongs to
                        if answer.status not in _REDIRECTS:
                            return _read_file(target.host, answer, budget)
                    location = answer.getheader("Location", "").encode("latin-1")  # what http.client takes headers for
                url = urllib.parse.urljoin(url, location.decode(errors="replace"))
            except TimeoutError:
                raise
            except (OSError, http.client.HTTPException, ValueError) as error:
                if budget.time_is_up:  # what is cut off at the deadline ends in one of these
                    raise TimeoutError from None
                raise _NotFetched(_reason(error, target.host)) from None
        raise _NotFetched(f"more than {MAX_REDIRECTS} redirects")

    def _target(self, url: str) -> _Target:
        """Take a URL apart and check what can be checked before its host's name is resolved."""
        try:
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https"):
                raise _NotFetched(f"its URL begins with {parts.scheme[:20]}://, and only http and https are fetched")
            if "@" in parts.netloc:
                raise _NotFetched("a URL with a user name or a password is not taken")
            host, port = plain_host(parts.hostname or ""), parts.port
        except ValueError:
            raise _NotFetched("the URL or its host name is malformed") from None
        if not self.allowed_hosts & {"*", host}:
            raise _NotFetched(f"the host {host} is not one that this server fetches from (ALLOWED_URL_HOSTS)")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return _Target(parts.scheme == "https", host, port, urllib.parse.quote(path, safe=_KEPT, errors="replace"))

    @contextmanager
    def _connect(self, target: _Target, budget: _Budget) -> Iterator[http.client.HTTPConnection]:
        """Connect to an allowed address of a host. At the deadline the connection is cut off, whatever it is doing."""
        found = _resolve(target.host, target.port, budget.seconds_left())
        allowed = [address for address in found if self.may_connect(address[0])]
        if not allowed:
            raise _NotFetched(f"{target.host} has no public address, and no other may be connected to")
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.auto_open = 0  # it must never connect by itself, by the host's name
        with closing(connection):
            connection.sock = _open_socket(allowed, budget)
            if target.is_tls:
                connection.sock = _tls_context().wrap_socket(
                    connection.sock, server_hostname=target.host, do_handshake_on_connect=False
                )
            with cut_off(connection.sock, budget.seconds_left()):
                if isinstance(connection.sock, ssl.SSLSocket):
                    connection.sock.do_handshake()
                yield connection


class _NotFetched(Exception):
    """A URL gave no file; the message is the reason, for the client."""


class _OutOfBytes(Exception):
    """There are more bytes than the budget has."""


class _Budget:
    """The bytes and the time that the files of one request may take together."""

    def __init__(self, max_bytes: int, timeout_s: float) -> None:
        self._bytes_left = max_bytes
        self._deadline = time.monotonic() + timeout_s
        self._lock = threading.Lock()

    @property
    def time_is_up(self) -> bool:
        return time.monotonic() >= self._deadline

    def seconds_left(self) -> float:
        """Return how many seconds are left, more than none; raise TimeoutError where there are none."""
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        return seconds

    def require(self, n_bytes: int) -> None:
        """Raise _OutOfBytes unless so many are left."""
        if n_bytes > self._bytes_left:
            raise _OutOfBytes

    def take(self, n_bytes: int) -> None:
        """Use some bytes; raise _OutOfBytes where they are not left."""
        with self._lock:
            self.require(n_bytes)
            self._bytes_left -= n_bytes

    def use_up(self) -> None:
        """Leave nothing to whoever still fetches."""
        with self._lock:
            self._bytes_left = 0


@dataclass(frozen=True)
class _Target:
    """Where a URL leads."""

    is_tls: bool
    host: str
    given_port: int | None
    path: str

    @property
    def port(self) -> int:
        return self.given_port if self.given_port is not None else (443 if self.is_tls else 80)

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.given_port is None else f"{host}:{self.given_port}"


def plain_host(host: str) -> str:
    """Return a host as it is compared and resolved, in lower case and ASCII; raise ValueError where it is none."""
    if ":" in host:  # an IPv6 address
        return str(IPv6Address(host))
    host = host.encode("idna").decode().rstrip(".").lower()
    if len(host) > _MAX_HOST_LENGTH or not _HOST_NAME.fullmatch(host):
        raise ValueError(host)
    return host


def _resolve(host: str, port: int, timeout_s: float) -> list[Any]:
    """Return the socket addresses of a host, without waiting longer than ``timeout_s`` for the resolver."""
    found: Future[list[Any]] = Future()

    def look_up() -> None:
        try:
            found.set_result([entry[4] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)])
        except Exception as error:  # it is raised again where the addresses are waited for
            found.set_exception(error)

    # The resolver cannot be interrupted, and its own timeout may be longer.
    threading.Thread(target=look_up, name="url-resolve", daemon=True).start()
    return found.result(timeout_s)


def _open_socket(addresses: list[Any], budget: _Budget) -> socket.socket:
    """Connect to the first address that answers. Each may take its share of the time that is left."""
    for index, address in enumerate(addresses[:-1]):
        with suppress(OSError):
            return _connected(address, budget.seconds_left() / (len(addresses) - index))
    return _connected(addresses[-1], budget.seconds_left())


def _connected(address: Any, timeout_s: float) -> socket.socket:
    opened = socket.socket(socket.AF_INET6 if len(address) == 4 else socket.AF_INET)
    try:
        opened.settimeout(timeout_s)
        opened.connect(address)
        opened.settimeout(None)
    except BaseException:
        opened.close()
        raise
    return opened


@cache
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()  # reads the system's certificates, which takes a while


def _read_file(host: str, answer: http.client.HTTPResponse, budget: _Budget) -> bytes:
    if answer.status != 200:
        raise _NotFetched(f"{host} answered {answer.status}")
    if answer.getheader("Content-Encoding", "identity").lower() != "identity":
        raise _NotFetched(f"{host} sent it compressed, without being asked to")
    announced = answer.length or 0
    budget.require(announced)
    chunks: list[bytes] = []
    while chunk := answer.read1(_CHUNK_BYTES):
        budget.take(len(chunk))
        chunks.append(chunk)
    data = b"".join(chunks)
    if budget.time_is_up:  # what was cut off looks like the end of the file
        raise TimeoutError
    if len(data) < announced:
        raise ConnectionResetError
    return data


def _reason(error: Exception, host: str) -> str:
    """Say in the client's words why a fetch failed."""
    if isinstance(error, socket.gaierror):
        return f"the host name {host} cannot be resolved"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate of {host} is not valid: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"{host} does not speak TLS properly"
    if isinstance(error, ConnectionRefusedError):
        return f"{host} refuses the connection"
    if isinstance(error, (ConnectionError, http.client.IncompleteRead)):
        return f"{host} broke the connection off"
    if isinstance(error, OSError):
        return f"{host} cannot be reached"
    return f"{host} does not speak HTTP properly"
