"""Files by URL: fetched from allowed hosts and public addresses alone, within their time and size."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import trustme

from feature_extraction_server.core import url_fetch
from feature_extraction_server.core.errors import DeadlineExceeded, InvalidInput, ServerError, TooLarge
from feature_extraction_server.core.turns import Turns
from feature_extraction_server.core.url_fetch import UrlFetcher, is_public, is_url
from tests.waiting import TIMEOUT_S, wait_until

EVERY = frozenset({"*"})
Answer = Callable[[BaseHTTPRequestHandler], None]


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that leave or refuse the certificate."""


class Site:
    """A real HTTP server on loopback; ``requests`` are the paths and ``Host`` headers that it was asked for."""

    def __init__(self, answers: dict[str, Answer], tls: ssl.SSLContext | None) -> None:
        self.requests: list[tuple[str, str]] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                site.requests.append((self.path, self.headers["Host"]))
                with suppress(OSError):  # the client may have seen enough
                    answers[self.path.partition("?")[0]](self)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self.server = QuietServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = self.server.server_address[1]
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self.port}"


def sends(body: bytes, status: int = 200, **headers: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(body)

    return answer


def redirects(location: str, status: int = 302) -> Answer:
    return sends(b"", status, Location=location)


def writes(data: bytes) -> Answer:
    """Send bytes as they are, in place of an answer."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(data)
        request.close_connection = True

    return answer


def drips(begin: bytes, ended: threading.Event) -> Answer:
    """Send a byte now and then, until nobody listens any more."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        try:
            request.wfile.write(begin)
            while not ended.wait(0.02):
                request.wfile.write(b"x")
        except OSError:
            ended.set()

    return answer


@pytest.fixture
def site() -> Iterator[Callable[..., Site]]:
    """``site(answers)`` starts a server that answers by path."""
    sites: list[tuple[Site, threading.Thread]] = []

    def start(answers: dict[str, Answer], tls: ssl.SSLContext | None = None) -> Site:
        made = Site(answers, tls)
        thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        sites.append((made, thread))
        return made

    yield start
    for made, thread in sites:
        made.server.shutdown()
        made.server.server_close()
        thread.join(TIMEOUT_S)


def fetch(url: str, **options: Any) -> bytes:
    """Fetch a file as the server does, but that the site on 127.0.0.1 may be connected to."""
    given: dict[str, Any] = {
        "allowed_hosts": EVERY,
        "timeout_s": TIMEOUT_S,
        "may_connect": lambda address: address == "127.0.0.1",
    }
    return UrlFetcher(**(given | options)).fetch_all({"image": url})["image"]


def refusal(url: str, **options: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        fetch(url, **options)
    assert (caught.value.status, caught.value.field) == (400, "image")
    return caught.value.message


@contextmanager
def resolving(monkeypatch: pytest.MonkeyPatch, names: dict[str, list[str]]) -> Iterator[list[str]]:
    """Resolve names to addresses of the test's choice, one after the other; gives the names that were looked up."""
    looked_up: list[str] = []
    real = socket.getaddrinfo

    def look_up(host: str, port: int, *arguments: Any, **options: Any) -> list[Any]:
        looked_up.append(host)
        addresses = names[host]
        address = addresses.pop(0) if len(addresses) > 1 else addresses[0]
        return [entry for one in address.split() for entry in real(one, port, *arguments, **options)]

    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", look_up)
        yield looked_up


# Which addresses are public


@pytest.mark.parametrize("address", ["8.8.8.8", "193.99.144.80", "2606:4700::1111", "2a00:1450::1", "64:ff9b::808:808"])
def test_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255"),
        *("192.168.1.1", "169.254.169.254", "100.64.0.1", "100.100.100.200", "192.0.0.192", "192.0.2.1"),
        *("192.88.99.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1"),
        *("255.255.255.255", "168.63.129.16", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8"),
        *("::ffff:0:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::1", "100::1", "2001::1"),
        *("2001:db8::1", "2002:7f00:1::", "2002:a00:1::", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254"),
        *("fe80::1", "fe80::1%1", "fec0::1", "ff02::1", "ff0e::1"),
    ],
)
def test_every_other_address_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("value", ["http://a", "https://a", " HTTPS://a", "ftp://a", "file:///etc/passwd"])
def test_text_with_a_scheme_is_a_url(value: str) -> None:
    assert is_url(value)


@pytest.mark.parametrize(
    "value", ["http", "aHR0cHM6Ly9h", "data:image/png;base64,aa//", "//a", "", None, 1, b"http://a"]
)
def test_base64_and_what_is_no_text_is_no_url(value: object) -> None:
    assert not is_url(value)


# Fetching


def test_file_is_fetched(site: Callable[..., Site]) -> None:
    server = site({"/a": sends(b"picture")})

    assert fetch(f"{server.url}/a?size=1&x=y#part") == b"picture"
    assert server.requests == [("/a?size=1&x=y", f"127.0.0.1:{server.port}")]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(sends(b"x" * 300_000), b"x" * 300_000, id="many chunks"),
        pytest.param(writes(b"HTTP/1.0 200 OK\r\n\r\nold"), b"old", id="until the connection ends"),
        pytest.param(
            writes(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"),
            b"abcde",
            id="chunked",
        ),
        pytest.param(sends(b"a", Content_Encoding="identity"), b"a", id="declared as it is"),
        pytest.param(sends(b""), b"", id="empty"),
    ],
)
def test_file_is_read_to_its_end(site: Callable[..., Site], answer: Answer, expected: bytes) -> None:
    assert fetch(site({"/a": answer}).url + "/a") == expected


def test_path_beyond_ascii_is_encoded(site: Callable[..., Site]) -> None:
    server = site({"/sch%C3%B6n%20%7Bb%7D.png": sends(b"picture")})

    assert fetch(f" {server.url}/schön {{b}}.png\n") == b"picture"


def test_several_files_are_fetched_at_the_same_time(site: Callable[..., Site]) -> None:
    together = threading.Barrier(3)

    def answer(request: BaseHTTPRequestHandler) -> None:
        together.wait(TIMEOUT_S)
        sends(request.path.encode())(request)

    server = site(dict.fromkeys(("/a", "/b", "/c"), answer))
    fetcher = UrlFetcher(EVERY, timeout_s=TIMEOUT_S, may_connect=lambda address: True)

    files = fetcher.fetch_all({f"image[{path}]": f"{server.url}/{path}" for path in "abc"})

    assert files == {"image[a]": b"/a", "image[b]": b"/b", "image[c]": b"/c"}


def test_fault_of_one_file_ends_the_others(site: Callable[..., Site]) -> None:
    ended = threading.Event()
    server = site({"/slow": drips(b"HTTP/1.1 200 OK\r\n\r\n", ended), "/no": sends(b"", 404)})
    fetcher = UrlFetcher(EVERY, timeout_s=TIMEOUT_S, may_connect=lambda address: True)

    with pytest.raises(InvalidInput, match=r"image\[1\] cannot be fetched: 127.0.0.1 answered 404"):
        fetcher.fetch_all({"image[0]": f"{server.url}/slow", "image[1]": f"{server.url}/no"})

    assert ended.wait(TIMEOUT_S)


# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("location", ["/b", "b", "//127.0.0.1:{port}/b", "http://127.0.0.1:{port}/b"])
def test_redirect_is_followed(site: Callable[..., Site], status: int, location: str) -> None:
    answers = {"/b": sends(b"picture")}
    server = site(answers)
    answers["/a"] = redirects(location.format(port=server.port), status)

    assert fetch(f"{server.url}/a") == b"picture"


def test_redirects_without_end_are_given_up(site: Callable[..., Site]) -> None:
    server = site({"/a": redirects("/a")})

    assert "more than 5 redirects" in refusal(f"{server.url}/a")
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    ("location", "word"),
    [
        ("http://127.0.0.2:{port}/b", "no public address"),
        ("http://[::1]:{port}/b", "no public address"),
        ("http://[::ffff:127.0.0.1]:{port}/b", "no public address"),
        ("http://0:{port}/b", "no public address"),
        ("http://10.0.0.1/b", "no public address"),
        ("http://169.254.169.254/latest/meta-data", "no public address"),
        ("ftp://127.0.0.1/b", "only http and https"),
        ("file:///etc/passwd", "only http and https"),
        ("http://user@127.0.0.1:{port}/b", "a user name"),
        ("http://[", "does not speak HTTP properly"),
    ],
)
def test_redirect_is_checked_as_the_url_was(
    monkeypatch: pytest.MonkeyPatch, site: Callable[..., Site], location: str, word: str
) -> None:
    answers = {"/b": sends(b"secret")}
    server = site(answers)
    answers["/a"] = redirects(location.format(port=server.port))

    # Loopback is what a name resolves to here that stands for a machine of the internet.
    with resolving(monkeypatch, {"files.test": ["127.0.0.1"], **{name: [name] for name in INNER}}):
        message = refusal(f"http://files.test:{server.port}/a", may_connect=lambda address: address == "127.0.0.1")

    assert word in message
    assert [path for path, _ in server.requests] == ["/a"]


# The third and the fourth are one address, as Python 3.12 and 3.13 write it.
INNER = ["127.0.0.2", "::1", "::ffff:7f00:1", "::ffff:127.0.0.1", "0", "10.0.0.1", "169.254.169.254"]


def test_redirect_to_a_host_that_is_not_allowed_is_refused(site: Callable[..., Site]) -> None:
    server = site({"/a": redirects("http://127.0.0.2/b")})

    message = refusal(f"{server.url}/a", allowed_hosts=frozenset({"127.0.0.1"}))

    assert "the host 127.0.0.2 is not one that this server fetches from (ALLOWED_URL_HOSTS)" in message


# Hosts and addresses


def test_nothing_is_fetched_unless_a_host_is_allowed() -> None:
    message = refusal("https://example.org/a.png", allowed_hosts=frozenset())

    assert message.startswith("image is a URL, and fetching by URL is switched off: the setting ALLOWED_URL_HOSTS")


@pytest.mark.parametrize(
    "url", ["http://FILES.test:{port}/a", "http://files.test.:{port}/a", "HTTP://files.test:{port}/a"]
)
def test_spelling_of_an_allowed_host_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, site: Callable[..., Site], url: str
) -> None:
    server = site({"/a": sends(b"picture")})

    with resolving(monkeypatch, {"files.test": ["127.0.0.1"]}):
        assert fetch(url.format(port=server.port), allowed_hosts=frozenset({"files.test"})) == b"picture"

    assert server.requests == [("/a", f"files.test:{server.port}")]


@pytest.mark.parametrize(
    "url",
    [
        "http://other.test/",
        "http://files.test.evil.test/",
        "http://evilfiles.test/",
        "http://sub.files.test/",
        "http://evil.test#files.test",
        "http://evil.test/files.test",
        "http://evil.test?files.test",
    ],
)
def test_other_hosts_than_those_allowed_are_refused(url: str) -> None:
    assert "is not one that this server fetches from" in refusal(url, allowed_hosts=frozenset({"files.test"}))


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001"),
        *("127.0.0.1.", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::]", "0.0.0.0", "0", "[fe80::1]"),
        *("10.0.0.1", "10.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "[fd00:ec2::254]"),
        *("[64:ff9b::7f00:1]", "\uff11\uff12\uff17.0.0.1", "localhost", "LOCALHOST", "localhost."),
    ],
)
def test_address_that_is_not_public_is_refused_in_every_spelling(host: str) -> None:
    message = refusal(f"http://{host}:1/", may_connect=is_public)

    assert "no public address" in message or "cannot be resolved" in message


@pytest.mark.parametrize(
    ("url", "word"),
    [
        pytest.param("ftp://files.test/a", "begins with ftp://, and only http and https", id="FTP"),
        pytest.param("file:///etc/passwd", "begins with file://", id="a file"),
        pytest.param("gopher://127.0.0.1:6379/_INFO", "begins with gopher://", id="Gopher"),
        pytest.param("http://user:secret@files.test/", "a user name or a password", id="credentials"),
        pytest.param("http://@files.test/", "a user name or a password", id="an empty user name"),
        pytest.param("http://files.test\\@evil.test/", "a user name", id="a backslash"),
        pytest.param("http://", "malformed", id="no host"),
        pytest.param("http:///a", "malformed", id="no host but a path"),
        pytest.param("http://:80/", "malformed", id="no host but a port"),
        pytest.param("http://files.test:port/", "malformed", id="a port that is no number"),
        pytest.param("http://files.test:99999/", "malformed", id="a port that is too large"),
        pytest.param("http://files test/", "malformed", id="a space"),
        pytest.param("http://files%2etest/", "malformed", id="a percent sign"),
        pytest.param("http://a..b/", "malformed", id="an empty label"),
        pytest.param(f"http://{'a' * 64}.test/", "malformed", id="a label that is too long"),
        pytest.param(f"http://{'a.' * 130}test/", "malformed", id="a name that is too long"),
        pytest.param("http://[::1/", "malformed", id="half an address"),
        pytest.param("http://[nothing]/", "malformed", id="brackets around a name"),
        pytest.param("http://\ud800.test/", "malformed", id="half a surrogate pair"),
        pytest.param("http://files.test\0.evil.test/", "malformed", id="a null byte"),
    ],
)
def test_url_that_cannot_be_taken_is_told_why(url: str, word: str) -> None:
    assert word in refusal(url)


def test_host_that_does_not_exist_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)

    assert "the host name nobody.test cannot be resolved" in refusal("http://nobody.test/")


def test_name_is_resolved_once_and_its_checked_address_connected_to(
    monkeypatch: pytest.MonkeyPatch, site: Callable[..., Site]
) -> None:
    server = site({"/a": sends(b"picture")})

    # Whoever asked a second time would be sent elsewhere.
    with resolving(monkeypatch, {"rebinding.test": ["127.0.0.1", "127.0.0.2"]}) as looked_up:
        assert fetch(f"http://rebinding.test:{server.port}/a") == b"picture"

    assert looked_up == ["rebinding.test"]


def test_addresses_that_are_not_allowed_are_passed_over(
    monkeypatch: pytest.MonkeyPatch, site: Callable[..., Site]
) -> None:
    server = site({"/a": sends(b"picture")})

    with resolving(monkeypatch, {"mixed.test": ["127.0.0.2 ::1 127.0.0.1"]}):
        assert fetch(f"http://mixed.test:{server.port}/a") == b"picture"


def test_next_address_is_tried_where_one_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, site: Callable[..., Site]
) -> None:
    server = site({"/a": sends(b"picture")})

    with resolving(monkeypatch, {"mixed.test": ["127.0.0.2 127.0.0.1"]}):
        assert fetch(f"http://mixed.test:{server.port}/a", may_connect=lambda address: True) == b"picture"


def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch, site: Callable[..., Site]) -> None:
    server = site({"/a": sends(b"picture")})
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")

    assert fetch(f"{server.url}/a") == b"picture"


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls_site(authority: trustme.CA, site: Callable[..., Site]) -> tuple[Site, list[str | None]]:
    """A server with a certificate for files.test, and the names that clients asked for in their handshakes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("files.test").configure_cert(context)
    names: list[str | None] = []
    context.sni_callback = lambda _, name, __: names.append(name)
    return site({"/a": sends(b"picture")}, context), names


@pytest.fixture
def trusted(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trust the authority, as an operator's SSL_CERT_FILE makes the server do."""
    with authority.cert_pem.tempfile() as path:
        monkeypatch.setenv("SSL_CERT_FILE", path)
        url_fetch._tls_context.cache_clear()
        yield
    url_fetch._tls_context.cache_clear()


@pytest.mark.usefixtures("trusted")
def test_certificate_is_checked_for_the_host_of_the_url(
    monkeypatch: pytest.MonkeyPatch, tls_site: tuple[Site, list[str | None]]
) -> None:
    server, names = tls_site

    with resolving(monkeypatch, {"files.test": ["127.0.0.1"], "other.test": ["127.0.0.1"]}):
        assert fetch(f"https://files.test:{server.port}/a") == b"picture"
        message = refusal(f"https://other.test:{server.port}/a")

    assert "the certificate of other.test is not valid: Hostname mismatch" in message
    assert names == ["files.test", "other.test"]
    assert server.requests == [("/a", f"files.test:{server.port}")]


def test_certificate_of_an_unknown_authority_is_refused(
    monkeypatch: pytest.MonkeyPatch, tls_site: tuple[Site, list[str | None]]
) -> None:
    with resolving(monkeypatch, {"files.test": ["127.0.0.1"]}):
        message = refusal(f"https://files.test:{tls_site[0].port}/a")

    assert "the certificate of files.test is not valid" in message


def test_server_without_tls_is_told(site: Callable[..., Site]) -> None:
    message = refusal(f"https://127.0.0.1:{site({}).port}/a")

    assert "127.0.0.1 does not speak TLS properly" in message


# Servers that give no file


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        pytest.param(sends(b"no", 404), "127.0.0.1 answered 404", id="not found"),
        pytest.param(sends(b"no", 500), "127.0.0.1 answered 500", id="broken"),
        pytest.param(sends(b"", 206), "127.0.0.1 answered 206", id="a part"),
        pytest.param(sends(b"", 304), "127.0.0.1 answered 304", id="not modified"),
        pytest.param(sends(b"a", Content_Encoding="gzip"), "sent it compressed", id="compressed"),
        pytest.param(sends(b"a", Content_Length="9"), "127.0.0.1 broke the connection off", id="cut short"),
        pytest.param(writes(b""), "127.0.0.1 broke the connection off", id="no answer"),
        pytest.param(writes(b"SSH-2.0-OpenSSH\r\n"), "127.0.0.1 does not speak HTTP properly", id="no HTTP"),
        pytest.param(
            writes(b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200), "does not speak HTTP properly", id="200 headers"
        ),
        pytest.param(
            writes(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nab"), "broke the", id="half a chunk"
        ),
        pytest.param(
            writes(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxy\r\nab"), "broke the", id="chunks broken"
        ),
    ],
)
def test_server_that_gives_no_file_is_told(site: Callable[..., Site], answer: Answer, word: str) -> None:
    def close_after(request: BaseHTTPRequestHandler) -> None:
        answer(request)
        request.close_connection = True

    message = refusal(site({"/a": close_after}).url + "/a")

    assert message.startswith("image cannot be fetched: ")
    assert word in message


def test_server_that_is_not_there_is_told() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen

        assert "127.0.0.1 refuses the connection" in refusal(f"http://127.0.0.1:{bound.getsockname()[1]}/a")


# Limits


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(sends(b"x" * 101), id="announced"),
        pytest.param(sends(b"", Content_Length="1000000000000"), id="announced and never sent"),
        pytest.param(writes(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 101), id="not announced"),
    ],
)
def test_file_that_is_too_large_is_refused(site: Callable[..., Site], answer: Answer) -> None:
    with pytest.raises(TooLarge, match=r"may have 100 bytes \(MAX_CONTENT_LENGTH\)") as caught:
        fetch(site({"/a": answer}).url + "/a", max_bytes=100)

    assert caught.value.field == "image"


def test_file_of_exactly_the_largest_size_is_fetched(site: Callable[..., Site]) -> None:
    assert len(fetch(site({"/a": sends(b"x" * 100)}).url + "/a", max_bytes=100)) == 100


def test_size_is_bounded_for_all_files_together(site: Callable[..., Site]) -> None:
    server = site({"/a": sends(b"x" * 60)})
    fetcher = UrlFetcher(EVERY, max_bytes=100, timeout_s=TIMEOUT_S, may_connect=lambda address: True)

    with pytest.raises(TooLarge):
        fetcher.fetch_all({"image[0]": f"{server.url}/a", "image[1]": f"{server.url}/a"})


@pytest.mark.parametrize(
    "begin",
    [
        pytest.param(b"", id="the status line"),
        pytest.param(b"HTTP/1.1 200 OK\r\nX: ", id="a header"),
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\n", id="the file"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", id="a file of known length"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", id="a chunk's length"),
    ],
)
def test_server_that_drips_is_given_up_in_time(site: Callable[..., Site], begin: bytes) -> None:
    ended = threading.Event()
    server = site({"/a": drips(begin, ended)})

    with pytest.raises(DeadlineExceeded, match=r"did not send it in time \(URL_TIMEOUT\)") as caught:
        fetch(f"{server.url}/a", timeout_s=0.3)

    assert (caught.value.status, caught.value.field) == (504, "image")
    assert ended.wait(TIMEOUT_S)


def test_who_waits_for_a_file_keeps_no_other_request_from_its_turn(site: Callable[..., Site]) -> None:
    begun, may_answer = threading.Event(), threading.Event()
    fetched: list[bytes] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        may_answer.wait(TIMEOUT_S)
        sends(b"a file")(request)

    server = site({"/a": answer})
    turns = Turns(1, 2)

    turns.submit(lambda: fetched.append(fetch(f"{server.url}/a", timeout_s=10)))
    turns.submit(begun.set)

    assert begun.wait(5)
    may_answer.set()
    wait_until(lambda: fetched == [b"a file"])
    turns.shutdown()


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_server_that_accepts_and_says_nothing_is_given_up_in_time(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(DeadlineExceeded):
        fetch(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/a", timeout_s=0.1)


def test_resolver_that_does_not_answer_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait(TIMEOUT_S))

    try:
        with pytest.raises(DeadlineExceeded):
            fetch("http://files.test/", timeout_s=0.1)
    finally:
        answered.set()


def test_redirects_share_the_time(site: Callable[..., Site]) -> None:
    ended = threading.Event()
    server = site({"/a": redirects("/b"), "/b": drips(b"", ended)})

    with pytest.raises(ServerError) as caught:
        fetch(f"{server.url}/a", timeout_s=0.2)

    assert isinstance(caught.value, DeadlineExceeded)
