"""BentoML: every process takes requests and runs the model.

python -m benchmarks.peers.bentoml PORT WORKLOAD PROCESSES
"""

import os
import sys
from pathlib import Path
from typing import Any

import bentoml  # type: ignore[import-not-found]

from benchmarks.workloads import MAX_BATCH_SIZE, WORKLOADS, load_in_one_of

# The service is imported anew in every process that BentoML starts: what it is about comes by the environment.
WORKLOAD = os.environ.get("BENCHMARK_WORKLOAD", "W0")
# No bound: BentoML answers 503 to what would take longer.
MAX_LATENCY_MS = 600_000
N_PROCESSES = int(os.environ.get("BENCHMARK_PROCESSES", "1"))


if WORKLOADS[WORKLOAD].gains_by_batches:
    OPTIONS = {"batchable": True, "max_batch_size": MAX_BATCH_SIZE, "max_latency_ms": MAX_LATENCY_MS}
else:
    OPTIONS = {}


@bentoml.service(workers=N_PROCESSES, traffic={"timeout": 600})
class Service:
    def __init__(self) -> None:
        self.model = load_in_one_of(N_PROCESSES, WORKLOAD)

    if WORKLOAD == "W0":  # what takes no time is faster without a thread

        @bentoml.api(route="/predict")  # type: ignore[untyped-decorator]
        async def predict(self, items: list[dict[str, Any]]) -> list[Any]:
            return self.model([self.model.decode(item) for item in items])

    else:

        @bentoml.api(route="/predict", **OPTIONS)  # type: ignore[untyped-decorator]
        def predict(self, items: list[dict[str, Any]]) -> list[Any]:
            return self.model([self.model.decode(item) for item in items])


def main(port: str, workload: str, n_processes: int) -> None:
    os.environ |= {
        "BENCHMARK_WORKLOAD": workload,
        "BENCHMARK_PROCESSES": str(n_processes),
        "BENTOML_HOME": os.getcwd(),
        "BENTOML_DO_NOT_TRACK": "True",
    }
    program = Path(sys.executable).parent / "bentoml"
    command = [str(program), "serve", "benchmarks.peers.bentoml:Service", "--host", "127.0.0.1", "--port", port]
    os.execv(sys.executable, [sys.executable, *command, "--quiet"])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
