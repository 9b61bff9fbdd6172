"""The default consumer: one thread of the engine's process loads the model and runs its jobs."""

from __future__ import annotations

import threading

from feature_extraction_server.core.logs import LogServer
from feature_extraction_server.core.model import ModelRun


def start(model: ModelRun, log_server: LogServer) -> threading.Thread:
    """Start the model's thread and return it."""
    # A daemon, so that a model that hangs cannot keep the process from ending.
    thread = threading.Thread(target=_consume, args=(model, log_server), name=f"consumer-{model.name}", daemon=True)
    thread.start()
    return thread


def _consume(model: ModelRun, log_server: LogServer) -> None:
    log_server.configure_worker()
    model.load_model()
    for job in model.fetch_jobs():
        job.run()
