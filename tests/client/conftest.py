"""Fixtures: the app behind a real socket, a server that answers by a script, and the command ``fes``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image
from werkzeug.serving import make_server

from feature_extraction_server.client import Client, cli
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.flask.app import create_app


@pytest.fixture
def url(engine: Engine) -> Iterator[str]:
    """Where a server with all plugins and the fakes answers, in a thread of this process."""
    server = make_server("127.0.0.1", 0, create_app(engine), threaded=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


class Request:
    """What a scripted server was asked."""

    def __init__(self, handler: BaseHTTPRequestHandler) -> None:
        self.path = handler.path
        self.headers = dict(handler.headers.items())
        self.body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))

    @property
    def content_type(self) -> str:
        return self.headers.get("Content-Type", "").partition(";")[0]


#: Status, headers and body of an answer; or None, to hang up without one.
Answer = tuple[int, dict[str, str], str] | None


class ScriptedServer:
    """A server whose answers a test decides: ``answer(request)`` gives each."""

    def __init__(self, answer: Callable[[Request], Answer]) -> None:
        self.requests: list[Request] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                request = Request(self)
                script.requests.append(request)
                answered = answer(request)
                if answered is None:
                    self.close_connection = True
                    return
                status, headers, body = answered
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def scripted() -> Iterator[Callable[..., ScriptedServer]]:
    """``scripted(*answers)`` gives a server that answers so, one after another, the last one for ever.

    In place of answers it takes one function of the request.
    """
    servers: list[ScriptedServer] = []

    def start(*answers: Answer | Callable[[Request], Answer]) -> ScriptedServer:
        function = answers[0]
        if not callable(function):
            left = list(answers)

            def function(request: Request) -> Answer:
                answer = left.pop(0) if len(left) > 1 else left[0]
                assert not callable(answer)
                return answer

        servers.append(ScriptedServer(function))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of three red pictures, 10, 20 and 30 pixels wide, in this order by name."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, width in (("a.png", 10), ("b.png", 20), ("c.png", 30)):
        Image.new("RGB", (width, 8), "red").save(folder / name)
    return folder


class Done:
    """How a command ended: its exit status, and what it printed."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status = status
        self.out = out
        self.err = err


@pytest.fixture
def fes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Callable[..., Done]:
    """``fes(*arguments)`` runs the command in this process, against the server of the fixture ``url`` if it is used."""
    monkeypatch.delenv("FES_API_KEY", raising=False)
    monkeypatch.setenv("FES_URL", request.getfixturevalue("url") if "url" in request.fixturenames else "http://[::1]:1")

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        return Done(int(exit.value.code or 0), *capsys.readouterr())

    return run
