"""The engine's end of the driver process, which is started with the first model on Ray and ends with the last.

The process has one socket by which the engine hands it others, one for each call that may be under way at a time.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from feature_extraction_server.core import subprocesses
from feature_extraction_server.core.errors import ModelUnavailable
from feature_extraction_server.core.wire import Channel

MODULE: Final = "feature_extraction_server.consumers.ray_consumer.driver"
GIVE_UP: Final = "give up"
LOST_RETRY_AFTER_S: Final = 5.0
_END_TIMEOUT_S: Final = 20.0
_lock: Final = threading.Lock()
_current: DriverProcess | None = None


def lost() -> ModelUnavailable:
    """Return the error of whoever waits while the driver ends, as it does where the cluster or Ray Serve has gone."""
    return ModelUnavailable("the Ray cluster was lost", retry_after=LOST_RETRY_AFTER_S)


class DriverProcess:
    """Speaks with Ray for all models of this engine."""

    def __init__(self) -> None:
        self.n_users = 0
        self._control, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", MODULE, str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command,
                env=subprocesses.environment(),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,
            )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def connect(self) -> Channel:
        """Return a channel to the driver, for one thread.

        Raises:
            ModelUnavailable: the driver has ended.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [b"c"], [theirs.fileno()])
            except OSError:
                ours.close()
                raise lost() from None
        return Channel(ours)

    @staticmethod
    def ask(
        channel: Channel, message: Any, is_wanted: Callable[[], bool] = lambda: True, check_interval_s: float = 60
    ) -> Any:
        """Send a message and return the answer.

        Args:
            is_wanted: asked now and then whether somebody waits; where nobody does, the driver gives the call up.

        Raises:
            ServerError: the answer is an error; or there is none, since the driver has ended.
        """
        given_up = False
        try:
            channel.send(message)
            while not channel.wait_for_news(check_interval_s):
                if not given_up and not is_wanted():
                    channel.send(GIVE_UP)
                    given_up = True
            succeeded, answer = channel.receive()
        except (OSError, EOFError):
            raise lost() from None
        if not succeeded:
            raise answer
        return answer

    def close(self) -> None:
        """End the process, and with it a cluster that it has started."""
        self._control.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_TIMEOUT_S)
            return
        os.killpg(self._process.pid, signal.SIGKILL)  # what it has started of Ray's, too
        self._process.wait()


def acquire() -> DriverProcess:
    """Return the engine's driver, which is started where there is none. Each call wants a ``release``."""
    global _current
    with _lock:
        if _current is None or not _current.is_alive:
            _current = DriverProcess()
        _current.n_users += 1
        return _current


def release(driver: DriverProcess) -> None:
    """End the driver where nobody else uses it."""
    global _current
    with _lock:
        driver.n_users -= 1
        if driver.n_users:
            return
        if _current is driver:
            _current = None
    driver.close()
