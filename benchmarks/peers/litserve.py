"""LitServe: one process for HTTP, the others run the model.

python -m benchmarks.peers.litserve PORT WORKLOAD PROCESSES
"""

import sys
from typing import Any

from litserve import LitAPI, LitServer  # type: ignore[import-not-found]

from benchmarks.workloads import MAX_BATCH_SIZE, WORKLOADS, load_in_one_of

BATCH_TIMEOUT_S = 0.002


class Api(LitAPI):  # type: ignore[misc]
    def __init__(self, workload: str, n_workers: int) -> None:
        self.batches = WORKLOADS[workload].gains_by_batches
        options = {"max_batch_size": MAX_BATCH_SIZE, "batch_timeout": BATCH_TIMEOUT_S} if self.batches else {}
        super().__init__(**options)
        self.workload = workload
        self.n_workers = n_workers

    def setup(self, device: str) -> None:
        self.model = load_in_one_of(self.n_workers, self.workload)

    def decode_request(self, request: dict[str, Any]) -> Any:
        return WORKLOADS[self.workload].decode(request)

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, inputs: Any) -> Any:
        return self.model(inputs) if self.batches else self.model([inputs])[0]

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: Any) -> Any:
        return output


def main(port: int, workload: str, n_processes: int) -> None:
    n_workers = n_processes - 1
    server = LitServer(Api(workload, n_workers), accelerator="cpu", workers_per_device=n_workers, timeout=600)
    server.run(
        host="127.0.0.1",
        port=port,
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
