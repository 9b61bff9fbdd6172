"""What the processes that this server starts have in common: the engine, and those of models."""

from __future__ import annotations

import os
import signal
import sys
from typing import Final

#: No api plugins: they belong to the web workers.
KINDS: Final = ("consumers", "tasks", "models")


def environment() -> dict[str, str]:
    """Return the environment for a process that is to find the same modules as this one."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def ignore_signals() -> None:
    """Outlive what ends all processes of a service at once: the web workers, which end first, still need answers."""
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
