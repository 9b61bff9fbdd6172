"""A consumer whose model lives in processes of its own: one, or as many as MODEL_REPLICAS_{MODEL} says.

A process that dies costs the request that it works on a 503, and is replaced at once; the others go on. Requests that
shared a call with that one are tried again, in ever smaller calls.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

from feature_extraction_server.core.errors import ModelLoadFailed, ServerError
from feature_extraction_server.core.jobs import Batch
from feature_extraction_server.core.logs import LogServer
from feature_extraction_server.core.model import ModelRun
from feature_extraction_server.core.model_process import ModelProcess
from feature_extraction_server.core.provenance import FILES, KEYS, difference


def start(model: ModelRun, log_server: LogServer) -> threading.Thread:
    """Start the thread that hands the model's jobs to its processes, and return it."""
    thread = threading.Thread(target=_consume, args=(model, log_server), name=f"consumer-{model.name}", daemon=True)
    thread.start()
    return thread


class Replicas:
    """Several processes of one model, loaded and unloaded together."""

    def __init__(self, model: ModelRun) -> None:
        n = model.options.n_replicas
        interval_s = model.options.result_check_interval
        self.processes = [ModelProcess(model.name, one, interval_s, lambda: model.is_needed) for one in range(n)]

    def load_model(self) -> None:
        for process in self.processes:
            process.spawn()
        try:
            self._with_all(ModelProcess.load_model)
            self._require_same_weights()
        except BaseException:
            self.unload_model()
            raise

    def unload_model(self) -> None:
        self._with_all(ModelProcess.unload_model)

    def provenance(self) -> dict[str, str | None]:
        """Return where the answers come from; what the processes differ in (their devices, say) is a list."""
        told = [process.provenance for process in self.processes if process.provenance is not None]
        found = {key: dict.fromkeys(value for one in told if (value := one[key]) is not None) for key in KEYS}
        return {key: ", ".join(values) or None for key, values in found.items()}

    def pids(self) -> list[int]:
        """Return the processes' numbers."""
        return [process.pid for process in self.processes if process.pid is not None]

    def _require_same_weights(self) -> None:
        """Raise ModelLoadFailed where the processes' answers come from different weights; their devices may differ."""
        first, *others = [process.provenance for process in self.processes if process.provenance is not None]
        for other in others:
            if different := difference(other, first, ("checkpoint", "revision", FILES)):
                raise ModelLoadFailed(f"its processes have loaded different weights: {different}")

    def _with_all(self, function: Callable[[ModelProcess], None]) -> None:
        with ThreadPoolExecutor(len(self.processes)) as pool:
            # In copies of this thread's context: it says who is told how far a download has come.
            contexts = [copy_context() for _ in self.processes]
            list(pool.map(lambda context, process: context.run(function, process), contexts, self.processes))


def _consume(model: ModelRun, log_server: LogServer) -> None:
    log_server.configure_worker()
    replicas = Replicas(model)
    model.module = replicas
    model.pids = replicas.pids
    model.load_model()
    free: queue.SimpleQueue[ModelProcess] = queue.SimpleQueue()
    for process in replicas.processes:
        free.put(process)

    def run(process: ModelProcess, job: Batch) -> None:
        job.module = process
        process.is_wanted = lambda: not job.abandoned
        try:
            job.run()
            _replace_if_dead(model, process)
        finally:
            free.put(process)

    jobs = model.fetch_jobs()
    with ThreadPoolExecutor(len(replicas.processes), f"replica-{model.name}") as pool:
        # Jobs are fetched only when a process is free: what waits until then goes out as one batch.
        process = free.get()
        for job in jobs:
            pool.submit(run, process, job)
            process = free.get()


def _replace_if_dead(model: ModelRun, process: ModelProcess) -> None:
    """Replace a process that has died at once, not with the next job. Where that fails, the model has failed."""
    if process.is_alive or not model.is_wanted:
        return
    try:
        process.replace()
    except ServerError as error:
        model.end(f"its process died, and another could not be started: {error.message}")
