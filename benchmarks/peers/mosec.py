"""Mosec: one process for HTTP, written in Rust; the others run the model.

python -m benchmarks.peers.mosec PORT WORKLOAD PROCESSES
"""

import json
import os
import sys
from typing import Any

from mosec import Server, Worker  # type: ignore[import-not-found]

from benchmarks.workloads import MAX_BATCH_SIZE, WORKLOADS, load_in_one_of

MAX_WAIT_TIME_MS = 2


class Model(Worker):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.model = load_in_one_of(int(os.environ["BENCHMARK_WORKERS"]), os.environ["BENCHMARK_WORKLOAD"])

    def deserialize(self, data: bytes) -> Any:
        return self.model.decode(json.loads(data))

    def forward(self, data: Any) -> Any:
        return self.model(data) if self.max_batch_size > 1 else self.model([data])[0]

    def serialize(self, data: Any) -> bytes:
        return json.dumps(data).encode()  # its own indents, a line a number


def main(port: str, workload: str, n_processes: int) -> None:
    os.environ |= {"BENCHMARK_WORKLOAD": workload, "BENCHMARK_WORKERS": str(n_processes - 1)}
    batches = WORKLOADS[workload].gains_by_batches
    options = {"max_batch_size": MAX_BATCH_SIZE, "max_wait_time": MAX_WAIT_TIME_MS} if batches else {}
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", port, "--timeout", "600000", "--log-level", "warning"]
    server = Server()
    server.append_worker(Model, num=n_processes - 1, route="/predict", **options)
    server.run()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
