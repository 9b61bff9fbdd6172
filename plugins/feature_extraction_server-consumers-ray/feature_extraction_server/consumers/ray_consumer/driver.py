"""The driver: the process that speaks with Ray for all models of an engine.

    python -m feature_extraction_server.consumers.ray_consumer.driver SOCKET

The engine hands it sockets by that one, and a thread serves each. It ends when the engine has gone or Ray Serve
was shut down, and Ray ends it when the cluster has gone: the engine starts another one with the next model.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, Final

from feature_extraction_server.consumers.ray_consumer.cluster import Cluster
from feature_extraction_server.consumers.ray_consumer.driver_process import GIVE_UP, MODULE
from feature_extraction_server.core import subprocesses
from feature_extraction_server.core.errors import ServerError
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.setup import set_up
from feature_extraction_server.core.wire import Channel, send_answer

logger = logging.getLogger(MODULE)  # in the process itself, __name__ is another
_CONNECTION: Final = "connection"  # what its threads are called
_END_S: Final = 1.0


def main(file_descriptor: int) -> None:
    """Serve the sockets that come, until the engine has gone, or Ray Serve."""
    subprocesses.ignore_signals()
    control = socket.socket(fileno=file_descriptor)
    registry, _, _ = set_up(SettingsManager(), kinds=subprocesses.KINDS)
    cluster = Cluster(registry, on_loss=lambda: control.shutdown(socket.SHUT_RDWR))  # as if the engine had gone
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            break
        channel = Channel(socket.socket(fileno=descriptors[0]))
        threading.Thread(target=_serve, args=(channel, cluster), name=_CONNECTION, daemon=True).start()
    _let_calls_end()
    cluster.close()
    logging.shutdown()
    os.killpg(0, signal.SIGKILL)  # Ray's threads must not keep it, and what Ray has not ended must not outlive it


def _let_calls_end() -> None:
    """Give calls under way the time to be cancelled on their replicas, which give up those that hang only then."""
    give_up_at = time.monotonic() + _END_S
    for thread in threading.enumerate():
        if thread.name == _CONNECTION:
            thread.join(max(0, give_up_at - time.monotonic()))


def _serve(channel: Channel, cluster: Cluster) -> None:
    try:
        while True:
            message = channel.receive()
            if message == GIVE_UP:  # it crossed the answer
                continue
            method, *arguments = message
            if method == "watch":
                (model,) = arguments
                cluster.watch(model, channel.send)
                channel.send(None)
                return
            answer = _answer(cluster, channel, method, *arguments)
            del message, arguments  # an idle channel holds on to no client's images
            send_answer(channel.send, answer)
            del answer
    except (EOFError, OSError):  # the engine has left
        pass
    finally:
        channel.close()


def _answer(cluster: Cluster, channel: Channel, method: str, *arguments: Any) -> tuple[bool, Any]:
    given_up = False

    def is_wanted() -> bool:
        nonlocal given_up
        if not given_up and channel.wait_for_news(0):
            channel.receive()  # it says that nobody waits any more
            given_up = True
        return not given_up

    try:
        if method == "call":
            model, function, positional, keywords, id = arguments
            return cluster.call(model, function, positional, keywords, id, is_wanted)
        if method == "start":
            model, grace_s = arguments
            return True, cluster.start(model, grace_s, is_wanted)
        cluster.stop(*arguments)
        return True, None
    except ServerError as error:
        return False, error.with_traceback(None)
    except (EOFError, OSError):
        raise
    except Exception as error:
        logger.exception("Ray failed on a request")
        return False, ServerError(f"Ray failed on this request: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
