"""A model hub in this process: as much of the Hugging Face hub's HTTP interface as downloading a checkpoint takes."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """Serves folders as repositories with one commit, ``main``, and further revisions that a test adds.

    ``hold`` makes every file with one of some endings stop half-way until ``release`` is called. ``stall`` makes
    requests for some paths wait for that, and ``fail`` answers them with an HTTP status; a HEAD is answered as ever.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Path] = {}
        self.downloaded: list[str] = []  # the files' names
        self.half_way = threading.Event()
        self._may_go_on = threading.Event()
        self._held: tuple[str, ...] = ()
        self._stalled: str | None = None
        self._failing: tuple[str, int] | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub._answer(self)

            do_GET = do_HEAD

            def log_message(self, *arguments: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def add(self, name: str, folder: Path, revision: str = "main") -> str:
        """Make a folder a repository's revision, and return its commit."""
        self.repositories[name, revision] = folder
        self.repositories[name, commit(name, revision)] = folder
        return commit(name, revision)

    def hold(self, *endings: str) -> None:
        """Stop files with these endings half-way; ``half_way`` is set when one is there."""
        self._held = endings

    def stall(self, part: str) -> None:
        """Leave requests without an answer whose path contains this."""
        self._stalled = part

    def fail(self, part: str, status: int) -> None:
        """Answer requests whose path contains this with a status."""
        self._failing = part, status

    def release(self) -> None:
        """Let everything that was stopped go on."""
        self._held = ()
        self._stalled = None
        self._may_go_on.set()

    def close(self) -> None:
        """End the server."""
        self.release()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        if request.command == "GET":
            if self._stalled is not None and self._stalled in request.path:
                self._may_go_on.wait(60)
                request.close_connection = True
                return
            if self._failing is not None and self._failing[0] in request.path:
                _refuse(request, "HubIsDown", self._failing[1])
                return
        if parts == [""]:
            _send(request, b"", {})
        elif parts[:2] == ["api", "models"] and len(parts) == 6 and parts[4] in ("revision", "tree"):
            self._list("/".join(parts[2:4]), parts[5], request)
        elif len(parts) > 4 and parts[2] == "resolve":
            self._send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), request)
        else:
            _refuse(request, "EntryNotFound")

    def _list(self, name: str, revision: str, request: BaseHTTPRequestHandler) -> None:
        folder = self.repositories.get((name, revision))
        if folder is None:
            known = any(name == repository for repository, _ in self.repositories)
            _refuse(request, "RevisionNotFound" if known else "RepoNotFound")
            return
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        if "/tree/" in request.path:
            told: Any = [
                {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": _etag(path)}
                for path in paths
            ]
        else:
            siblings = [
                {"rfilename": str(path.relative_to(folder)), "size": path.stat().st_size, "blobId": _etag(path)}
                for path in paths
            ]
            sha = revision if len(revision) == 40 else commit(name, revision)
            told = {"id": name, "modelId": name, "sha": sha, "siblings": siblings, "tags": [], "private": False}
        _send(request, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def _send_file(self, name: str, revision: str, file: str, request: BaseHTTPRequestHandler) -> None:
        folder = self.repositories.get((name, revision))
        if folder is None or not (folder / file).is_file():
            _refuse(request, "EntryNotFound")
            return
        if request.command == "GET":
            self.downloaded.append(file)
        sha = revision if len(revision) == 40 else commit(name, revision)
        headers = {"ETag": f'"{_etag(folder / file)}"', "X-Repo-Commit": sha}
        held = file.endswith(self._held) if self._held else False
        _send(request, (folder / file).read_bytes(), headers, self._wait_half_way if held else None)

    def _wait_half_way(self) -> None:
        self.half_way.set()
        self._may_go_on.wait(60)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Give a hub, and end it afterwards."""
    hub = Hub()
    try:
        yield hub
    finally:
        hub.close()


def commit(name: str, revision: str) -> str:
    """Return the commit that a revision of a repository is."""
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


def copy_with(folder: Path, target: Path, *names: str) -> Path:
    """Copy a checkpoint and add files that its model does not need."""
    shutil.copytree(folder, target)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(b"not needed")
    return target


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _send(request: BaseHTTPRequestHandler, body: bytes, headers: dict[str, str], half_way: Any = None) -> None:
    request.send_response(200)
    for name, value in (headers | {"Content-Length": str(len(body))}).items():
        request.send_header(name, value)
    request.end_headers()
    if request.command == "HEAD":
        return
    middle = len(body) // 2 if half_way else 0
    request.wfile.write(body[:middle])
    request.wfile.flush()
    if half_way:
        half_way()
    request.wfile.write(body[middle:])


def _refuse(request: BaseHTTPRequestHandler, code: str, status: int = 404) -> None:
    request.send_response(status)
    request.send_header("X-Error-Code", code)
    request.send_header("X-Error-Message", f"{code} at this hub")
    request.send_header("Content-Length", "0")
    request.end_headers()
