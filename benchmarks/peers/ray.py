"""Ray Serve: one proxy for HTTP, the other processes are replicas that run the model. Ray's own are not counted.

python -m benchmarks.peers.ray PORT WORKLOAD PROCESSES
"""

import os
import signal
import sys
from typing import Any

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's own set for throughput, but for clients that would have to find the replicas' ports themselves.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
}

import ray  # type: ignore[import-not-found]
from ray import serve
from starlette.requests import Request  # type: ignore[import-not-found]
from starlette.responses import JSONResponse  # type: ignore[import-not-found]

from benchmarks.workloads import MAX_BATCH_SIZE, load_in_one_of

MAX_ONGOING_REQUESTS = 1024
BATCH_WAIT_TIMEOUT_S = 0.002


class Model:
    def __init__(self, workload: str, n_replicas: int) -> None:
        self.model = load_in_one_of(n_replicas, workload)

    @serve.batch(max_batch_size=MAX_BATCH_SIZE, batch_wait_timeout_s=BATCH_WAIT_TIMEOUT_S)  # type: ignore[untyped-decorator]
    async def run_batch(self, items: list[Any]) -> list[Any]:
        return self.model(items)

    async def __call__(self, request: Request) -> JSONResponse:
        item = self.model.decode(await request.json())
        result = await self.run_batch(item) if self.model.gains_by_batches else self.model([item])[0]
        return JSONResponse(result)


def main(port: int, workload: str, n_processes: int) -> None:
    n_replicas = n_processes - 1
    ray.init(
        include_dashboard=False,
        num_cpus=n_processes,
        object_store_memory=100_000_000,
        _node_ip_address="127.0.0.1",
        _temp_dir=os.path.join(os.getcwd(), "ray"),
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    deployment = serve.deployment(
        Model, num_replicas=n_replicas, max_ongoing_requests=MAX_ONGOING_REQUESTS, ray_actor_options={"num_cpus": 1}
    )
    serve.run(
        deployment.bind(workload, n_replicas), route_prefix="/predict", logging_config={"enable_access_log": False}
    )
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
