"""What a model takes of the machine: the device that its weights are on, the memory of its processes."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any


def device_of(module: Any) -> str | None:
    """Return the device of a loaded model as PyTorch names it (``cpu``, ``cuda:0``); None where it cannot be told.

    It is that of the first PyTorch module among the globals of the model's module. A model made with another library
    says it by a global ``device``.
    """
    if (stated := vars(module).get("device")) is not None:
        return str(stated)
    torch = sys.modules.get("torch.nn.modules.module")
    if torch is None or not hasattr(torch, "Module"):  # nobody has it, or another thread is still importing it
        return None
    for value in vars(module).values():
        if isinstance(value, torch.Module) and (weights := next(value.parameters(), None)) is not None:
            return str(weights.device)
    return None


def resident_bytes(pids: Iterable[int]) -> int | None:
    """Return how much main memory some processes hold; None where that cannot be told, or where there is none."""
    total = 0
    for pid in pids:
        with suppress(OSError):  # it has just ended, or this is not Linux
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    return total or None
