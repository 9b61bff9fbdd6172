"""How gunicorn serves the app. Options on gunicorn's command line override what is said here.

gunicorn reads this file by itself where it lies in the working directory, else with ``-c``.
"""

import os
import sys
from pathlib import Path


def number_of_workers() -> int:
    """Return NUMBER_OF_WORKERS, or 1 where it is unset or empty."""
    text = os.environ.get("NUMBER_OF_WORKERS", "").strip() or "1"
    if not text.isdecimal() or int(text) < 1:
        problem = f"NUMBER_OF_WORKERS={text!r} is not allowed: it must be a whole number of at least 1"
        sys.stderr.write(f"feature_extraction_server: {problem}\n")
        raise SystemExit(2)
    return int(text)


wsgi_app = "feature_extraction_server.flask.entrypoint:entrypoint()"
bind = ":5000"
workers = number_of_workers()

# A request waits in its thread until the model has answered, and requests that wait together share one call of the
# model: with one thread a worker, there would never be two to share. There are more threads than requests may wait for
# one model (MAX_QUEUE_SIZE, 1024), so that a model that is slow, full or hangs keeps neither other models' requests
# nor health checks waiting. Threads are made when they are needed, and few of them run Python code at a time.
worker_class = "feature_extraction_server.flask.worker.Worker"
threads = 1100
worker_connections = 2048

# Plugins are imported once, and a wrong setting is told before a worker is forked.
preload_app = True

# A worker must show that it lives this often. Its threads may be busy for longer; REQUEST_TIMEOUT bounds a request.
timeout = 600

# For so long requests may finish after SIGTERM. Then models stop, which may take STOP_GRACE_PERIOD (30 s) more.
graceful_timeout = 45

# Clients mostly send one request after another. A proxy has to close its idle connections sooner than this, or now and
# then one is closed under its next request (docs/cluster.md has nginx do so).
keepalive = 5

# The file whose age tells that a worker lives: on a disk that is busy, touching it can block the worker.
if Path("/dev/shm").is_dir():
    worker_tmp_dir = "/dev/shm"

# Its socket lies in the home directory, where two servers of one user would take it from each other.
control_socket_disable = True
