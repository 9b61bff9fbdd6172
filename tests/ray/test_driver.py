"""What the process that speaks with Ray does with the engine's sockets."""

from __future__ import annotations

import socket
import threading
import weakref
from typing import Any

from PIL import Image

from feature_extraction_server.consumers.ray_consumer import driver
from feature_extraction_server.core.wire import Channel
from tests.waiting import TIMEOUT_S, wait_until


class FakeCluster:
    """Answers each call with a picture, and knows whether that and the call's own are still there."""

    def __init__(self) -> None:
        self.seen: list[weakref.ref[Any]] = []

    def call(self, model: str, function: str, positional: Any, *others: Any) -> tuple[bool, Any]:
        answer = Image.new("RGB", (4, 4))
        self.seen += [weakref.ref(positional[0]), weakref.ref(answer)]
        return True, answer


def test_a_channel_that_waits_for_the_next_call_holds_no_pictures_of_the_last_one() -> None:
    ours, theirs = socket.socketpair()
    channel, cluster = Channel(ours), FakeCluster()
    thread = threading.Thread(target=driver._serve, args=(Channel(theirs), cluster))
    thread.start()

    channel.send(("call", "model", "caption", (Image.new("RGB", (8, 8)),), {}, None))
    succeeded, _ = channel.receive()

    assert succeeded
    assert len(cluster.seen) == 2
    wait_until(lambda: all(picture() is None for picture in cluster.seen), "the end of the pictures")
    channel.close()
    thread.join(TIMEOUT_S)
