"""Starts the nodes of a Ray cluster on this machine, as ``ray start`` does, from one process that imports Ray once.

Each line that it reads is the JSON of a node's parameters; it answers with one that tells the node's processes. It
ends, and all nodes with it, when nobody writes to it any more. ``cluster`` beside this file speaks with it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import psutil
from ray._private.node import Node
from ray._private.parameter import RayParams


def start(parameters: dict[str, Any], variables: dict[str, str]) -> list[int]:
    """Start a node, the head where no ``gcs_address`` is given, and return its processes."""
    is_head = "gcs_address" not in parameters
    node = Node(RayParams(env_vars=variables, **parameters), head=is_head, shutdown_at_exit=False, spawn_reaper=False)
    return [one.process.pid for kind in node.all_processes.values() for one in kind]


def main() -> None:
    try:
        for line in sys.stdin:
            pids = start(*json.loads(line))
            sys.stdout.write(f"{json.dumps(pids)}\n")
            sys.stdout.flush()
    finally:
        for process in psutil.Process().children(recursive=True):
            process.kill()


if __name__ == "__main__":
    main()
