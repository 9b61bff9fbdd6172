"""Bare Flask under the same gunicorn configuration as this server: each worker has the model and a lock around it.

python -m benchmarks.peers.flask PORT WORKLOAD PROCESSES
"""

import os
import sys
import threading
from functools import cache
from pathlib import Path

from flask import Flask, Response, jsonify, request

from benchmarks.workloads import WORKLOADS, Workload, load_in_one_of

ROOT = Path(__file__).resolve().parents[2]


def create_app(workload: str, n_processes: int) -> Flask:
    app = Flask(__name__)
    lock = threading.Lock()
    decode = WORKLOADS[workload].decode

    # Not before the first request: threads that torch starts in the master would not exist in a worker.
    @cache
    def model() -> Workload:
        return load_in_one_of(n_processes, workload)

    @app.post("/predict")
    def predict() -> Response:
        item = decode(request.get_json())
        with lock:
            (result,) = model()([item])
        return jsonify(result)

    return app


def main(port: str, workload: str, n_processes: int) -> None:
    app = f"benchmarks.peers.flask:create_app({workload!r},{n_processes})"
    # In its environment there is nothing of this server's: it has gunicorn's own threads.
    command = [sys.executable, "-m", "gunicorn", "-c", str(ROOT / "gunicorn.conf.py"), "-k", "gthread"]
    os.execv(sys.executable, [*command, "-b", f"127.0.0.1:{port}", "-w", str(n_processes), app])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
