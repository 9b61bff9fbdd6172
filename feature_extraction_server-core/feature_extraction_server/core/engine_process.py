"""The engine's own process: runs the models of all web workers of one server.

    python -m feature_extraction_server.core.engine_process DIRECTORY OWNER_PID

It listens on ``DIRECTORY/engine`` and ends when the owner has gone.
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
from feature_extraction_server.core.engine_client import ENGINE_MODULE, is_alive, process_start_time
from feature_extraction_server.core.engine_connections import Connections
from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.setup import build_engine

logger = logging.getLogger(ENGINE_MODULE)  # in the process itself, __name__ is another

BACKLOG: Final = 512
CHECK_INTERVAL_S: Final = 0.2


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
    connections = Connections(listener, engine, ending)
    threading.Thread(target=connections.serve, name="connections", daemon=True).start()
    logger.info("The engine runs for the process %d", owner_pid)
    engine.preload()
    born = process_start_time(owner_pid)
    while not ending.wait(CHECK_INTERVAL_S) and is_alive(owner_pid, born):
        try:
            connections.look_round()
            engine.notice_dead_consumers()
        except Exception:
            logger.exception("The engine failed to look round")
    shutil.rmtree(directory, ignore_errors=True)
    engine.close()
    # Threads may still sit in a model's native code or in a read; nobody waits for them any more.
    logging.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
