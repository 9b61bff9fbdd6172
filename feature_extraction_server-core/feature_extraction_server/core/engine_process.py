"""The engine's own process: runs the models of all web workers of one server.

    python -m feature_extraction_server.core.engine_process DIRECTORY OWNER_PID

It listens on ``DIRECTORY/engine`` and ends when the owner has gone, or when another engine has taken its place there.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

from feature_extraction_server.core import subprocesses
from feature_extraction_server.core.engine_client import (
    ENGINE_MODULE,
    is_alive,
    is_listened_to,
    private_directory,
    process_start_time,
)
from feature_extraction_server.core.engine_connections import Connections
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.setup import build_engine

logger = logging.getLogger(ENGINE_MODULE)  # in the process itself, __name__ is another

BACKLOG: Final = 512
CHECK_INTERVAL_S: Final = 0.2


def main(directory: Path, owner_pid: int) -> None:
    """Serve until the owner has gone, a client says ``shutdown``, or another engine has taken this one's place."""
    subprocesses.ignore_signals()
    engine = build_engine(SettingsManager(), kinds=subprocesses.KINDS)
    address = directory / "engine"
    if is_listened_to(address):  # by an engine whose socket was gone when this one was started
        logger.warning("Another engine listens on %s already; this one ends", address)
        engine.close()
        return
    listener, inode = _listen(address)
    ending = threading.Event()
    connections = Connections(listener, engine, ending)
    threading.Thread(target=connections.serve, name="connections", daemon=True).start()
    logger.info("The engine runs for the process %d", owner_pid)
    engine.preload()
    born = process_start_time(owner_pid)
    is_replaced = False
    while not (is_replaced or ending.wait(CHECK_INTERVAL_S)) and is_alive(owner_pid, born):
        try:
            connections.look_round()
            engine.notice_dead_consumers()
            engine.retry_preloaded()
            found = _inode(address)
            is_replaced = found not in (inode, None)
            if found is None:
                logger.warning("%s is gone, as after a clean-up of temporary files; the engine makes it again", address)
                private_directory(owner_pid)
                listener, inode = _listen(address)
                connections.listen(listener)
        except Exception:
            logger.exception("The engine failed to look round")
    if is_replaced:
        logger.warning("Another engine listens on %s now; this one ends", address)
    else:
        shutil.rmtree(directory, ignore_errors=True)
    engine.close()
    # Threads may still sit in a model's native code or in a read; nobody waits for them any more.
    logging.shutdown()
    os._exit(0)


def _listen(address: Path) -> tuple[socket.socket, int | None]:
    """Return a socket that listens there, and the number of its file."""
    with suppress(FileNotFoundError):
        address.unlink()  # of an engine that was killed
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen(BACKLOG)
    return listener, _inode(address)


def _inode(address: Path) -> int | None:
    """Return the number of a socket's file, which another's there has not; None where there is no file."""
    try:
        return address.lstat().st_ino
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
