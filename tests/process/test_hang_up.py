"""Clients that do not wait for their answer: what they asked for is dropped before it reaches the model."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from tests.conftest import Server, encode_image
from tests.waiting import TIMEOUT_S, wait_until

pytestmark = pytest.mark.process

PATH = "/api/models/fake_slow/tasks/image_captioning/features"
STATUS = "/api/models/fake_slow/status"
SETTINGS = {"FAKE_SECONDS": "2", "MAX_BATCH_SIZE": "1", "RESULT_CHECK_INTERVAL": "0.02"}


def body(width: int) -> dict[str, str]:
    return {"image": encode_image(Image.new("RGB", (width, 9)))}


def send_without_reading(server: Server, width: int) -> socket.socket:
    content = json.dumps(body(width)).encode()
    port = int(server.url.rpartition(":")[2])
    connection = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("kind", ["gunicorn", "dev_server"])
def test_a_queued_job_whose_client_hung_up_does_not_reach_the_model(kind: str, request: pytest.FixtureRequest) -> None:
    start: Callable[..., Server] = request.getfixturevalue(kind)
    options = ("--preload", "-k", "gthread", "--threads", "16") if kind == "gunicorn" else ()
    server = start(*options, **SETTINGS)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.post, PATH, body(10))
        wait_until(lambda: server.get(STATUS).json()["running_jobs"] == 1)
        gone = [send_without_reading(server, width) for width in (20, 21, 22)]
        wait_until(lambda: server.get(STATUS).json()["queue_depth"] == 3)

        for connection in gone:
            connection.close()

        wait_until(lambda: server.get(STATUS).json()["queue_depth"] == 0)
        assert running.result(TIMEOUT_S).json() == ["10 in a batch of 1, call 1, load 1"]
    assert server.post(PATH, body(30)).json() == ["30 in a batch of 1, call 2, load 1"]


def test_a_client_that_waits_is_answered_however_often_it_is_looked_after(gunicorn: Callable[..., Server]) -> None:
    server = gunicorn("--preload", **SETTINGS)

    with send_without_reading(server, 40) as connection:
        answer = connection.recv(65536)

    assert answer.startswith(b"HTTP/1.1 200")
