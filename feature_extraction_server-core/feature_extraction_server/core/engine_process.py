"""The engine's own process: runs the models of all web workers of one server.

    python -m feature_extraction_server.core.engine_process DIRECTORY OWNER_PID

It listens on ``DIRECTORY/engine``, a thread a connection, and ends when the owner has gone.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import threading
import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

from feature_extraction_server.core import subprocesses
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.engine_client import ENGINE_MODULE, REST_WANTED, is_alive, process_start_time
from feature_extraction_server.core.errors import ClientDisconnected, ServerError
from feature_extraction_server.core.jobs import Call
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.setup import build_engine
from feature_extraction_server.core.tracking import RequestRecord, current
from feature_extraction_server.core.wire import Channel, send_answer

logger = logging.getLogger(ENGINE_MODULE)  # in the process itself, __name__ is another

BACKLOG: Final = 512
OWNER_CHECK_INTERVAL_S: Final = 0.2


def main(directory: Path, owner_pid: int) -> None:
    """Serve until the owner has gone or a client says ``shutdown``."""
    subprocesses.ignore_signals()
    engine = build_engine(SettingsManager(), kinds=subprocesses.KINDS)
    address = directory / "engine"
    with suppress(FileNotFoundError):
        address.unlink()  # of an engine that was killed
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen(BACKLOG)
    ending = threading.Event()
    threading.Thread(target=_accept, args=(listener, engine, ending), name="accept", daemon=True).start()
    logger.info("The engine runs for the process %d", owner_pid)
    engine.preload()
    born = process_start_time(owner_pid)
    while not ending.wait(OWNER_CHECK_INTERVAL_S) and is_alive(owner_pid, born):
        pass
    shutil.rmtree(directory, ignore_errors=True)
    engine.close()
    # Threads may still sit in a model's native code or in a read; nobody waits for them any more.
    logging.shutdown()
    os._exit(0)


def _accept(listener: socket.socket, engine: Engine, ending: threading.Event) -> None:
    while True:
        try:
            connected, _ = listener.accept()
        except OSError:
            if ending.is_set():
                return
            logger.exception("A connection of a web worker could not be accepted")
            time.sleep(OWNER_CHECK_INTERVAL_S)  # out of file descriptors, say: not a reason to spin
            continue
        threading.Thread(
            target=_serve, args=(Channel(connected), engine, ending), name="connection", daemon=True
        ).start()


def _serve(connection: Channel, engine: Engine, ending: threading.Event) -> None:
    with closing(connection), suppress(EOFError, OSError):  # the web worker has left
        while True:
            request = connection.receive()
            if request == (None, "shutdown"):
                ending.set()
                threading.Event().wait()  # the process's end closes the connection, which tells the client
            id, wants_origin, *asked = request
            record = RequestRecord(id) if id else None
            current.set(record)
            succeeded, answer = _answer(engine, connection, *asked)
            times = record and record.times and tuple(record.times)
            origin = record and wants_origin and record.answer_origin and tuple(record.answer_origin)
            send_answer(connection, (succeeded, answer, times, origin or None))


def _receive_rest(connection: Channel) -> dict[str, Any]:
    """Ask the web worker for the rest of a call's arguments."""
    try:
        connection.send(REST_WANTED)
        rest: dict[str, Any] = connection.receive()
        return rest
    except (EOFError, OSError):  # it could not decode them, say, and has told its client
        raise ClientDisconnected("the web worker has given the call up") from None


def _answer(engine: Engine, connection: Channel, method: str, model: str, *arguments: Any) -> tuple[bool, Any]:
    try:
        if method == "call":
            call, has_rest, deadline = arguments
            asked = Call(*call)
            if has_rest:
                asked = asked._replace(rest=partial(_receive_rest, connection))
            # A web worker that waits has nothing more to say: news are that it, or its client, has gone.
            return True, engine.call(model, asked, deadline, lambda: not connection.wait_for_news(0))
        if method == "recall":
            (keys,) = arguments
            return True, engine.recall(model, keys, 0.0, lambda: True)
        if method == "remember":
            identity, answers = arguments
            engine.remember(model, identity, answers)
            return True, None
        if method == "status":
            return True, engine.status(model)
        if method == "overview":
            return True, engine.overview(0)
        (wait,) = arguments
        (engine.start if method == "start" else engine.stop)(model, wait=wait)
        return True, None
    except ServerError as error:
        return False, error.with_traceback(None)  # whose frames hold the call's pictures
    except Exception:
        logger.exception("The engine failed on a request")
        return False, ServerError("the engine failed on this request; its log says why")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
