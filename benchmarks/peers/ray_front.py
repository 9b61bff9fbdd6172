"""Ray Serve's own HTTP front before the replicas that ``ray_consumer`` has deployed; ``ray_cluster.py`` starts it.

python -m benchmarks.peers.ray_front ADDRESS PORT APPLICATION FUNCTION
"""

import logging
import signal
import sys

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from benchmarks.workloads import decode_image


class Front:
    """Decodes a batch of pictures and hands it to the model's replicas as one call."""

    def __init__(self, application: str, function: str) -> None:
        self._replicas = serve.get_deployment_handle("model", application).options(method_name="call")
        self._function = function

    async def __call__(self, request: Request) -> JSONResponse:
        images = [decode_image(picture) for picture in (await request.json())["image"]]
        _, results, _ = await self._replicas.remote(self._function, (), {"image": images}, None)
        return JSONResponse(results)


def main(address: str, port: int, application: str, function: str) -> None:
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    sys.stdout.write("started\n")
    sys.stdout.flush()
    sys.stdin.readline()  # the replicas are there
    deployment = serve.deployment(Front, max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0})
    serve.run(
        deployment.bind(application, function),
        name="front",
        route_prefix="/predict",
        logging_config={"enable_access_log": False},
    )
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    signal.sigwait([signal.SIGTERM, signal.SIGINT])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
