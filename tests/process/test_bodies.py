"""Forms, single files and URLs as real clients send them to a real server."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from tests.conftest import Server
from tests.http.bad_requests import CAPTION, CLASSIFY, CONDITIONAL
from tests.http.test_bodies import TALL, WIDE

pytestmark = pytest.mark.process

OPTIONS = ("--preload", "-k", "gthread", "--threads", "4")
RED, BLUE = "40x30 (255, 0, 0)", "20x60 (0, 0, 255)"


def chunks(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), 50):
        yield data[start : start + 50]


@pytest.mark.parametrize("kind", ["gunicorn", "dev_server"])
def test_client_library_sends_forms_and_files(kind: str, request: pytest.FixtureRequest) -> None:
    start: Callable[..., Server] = request.getfixturevalue(kind)
    url = start(*(OPTIONS if kind == "gunicorn" else ())).url

    form = requests.post(url + CAPTION, files={"image": WIDE}, data={"config": "{}"}, timeout=60)
    batch = requests.post(url + CAPTION, files=[("image", WIDE), ("image", TALL)], timeout=60)
    classes = requests.post(url + CLASSIFY, files={"image": WIDE}, data={"classes": ["a", "b"]}, timeout=60)
    single = requests.post(url + CAPTION, WIDE, headers={"Content-Type": "image/png"}, timeout=60)
    chunked = requests.post(url + CAPTION, chunks(WIDE), headers={"Content-Type": "image/png"}, timeout=60)
    empty = requests.post(url + CAPTION, headers={"Content-Type": "multipart/form-data; boundary=b"}, timeout=60)

    assert [form.json(), single.json(), chunked.json()] == [[RED]] * 3
    assert batch.json() == [[RED], [BLUE]]
    assert classes.json() == [0.5, 0.5]
    assert (empty.status_code, empty.json()["code"]) == (400, "invalid_input")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_sends_forms_and_files(gunicorn: Callable[..., Server], tmp_path: Path) -> None:
    server = gunicorn(*OPTIONS)
    (tmp_path / "wide.png").write_bytes(WIDE)
    (tmp_path / "tall.png").write_bytes(TALL)

    def curl(path: str, *arguments: str) -> str:
        command = ["curl", "-sS", "--max-time", "60", server.url + path, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    assert curl(CAPTION, "-F", "image=@wide.png", "-F", 'config={"a": 1}') == f'["{RED}"]'
    assert curl(CAPTION, "-F", "image=@wide.png", "-F", "image=@tall.png") == f'[["{RED}"],["{BLUE}"]]'
    assert curl(CONDITIONAL, "-F", "image=@wide.png", "-F", "text=a red") == '["40x30"]'
    assert curl(CAPTION, "--data-binary", "@wide.png", "-H", "Content-Type: image/png") == f'["{RED}"]'
    assert "multipart/form-data" in curl(CAPTION, "--data-binary", "@wide.png")


def test_server_connects_to_no_address_of_its_own_network(gunicorn: Callable[..., Server]) -> None:
    server = gunicorn(*OPTIONS, ALLOWED_URL_HOSTS="*", URL_TIMEOUT="10")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        hosts = ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "0"]
        hosts += ["0.0.0.0", "[::]", "localhost", "10.0.0.1", "169.254.169.254", "192.168.0.1"]

        answers = {host: server.post(CAPTION, {"image": f"http://{host}:{port}/a.png"}) for host in hosts}
        answers["itself"] = server.post(CAPTION, {"image": f"{server.url}/api/tasks/list"})

        listener.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has connected
            listener.accept()
    assert {(answer.status_code, answer.json()["field"]) for answer in answers.values()} == {(400, "image")}
    reasons = ("no public address", "cannot be resolved")
    assert [host for host, answer in answers.items() if not any(word in answer.text for word in reasons)] == []
