"""Direct calls of a model in one process, without any server: the answers to expect, and the rate no server can beat.

python -m benchmarks.peers.direct WORKLOAD SECONDS CONNECTIONS...

prints a JSON object: ``answers``, one for each body, and ``measurements``, one for each number of connections. That
many requests are taken as waiting: their decoding is shared by a thread a core, then the model runs them as one batch.
"""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from typing import Any

from benchmarks.load import Measurement, summarize
from benchmarks.workloads import MAX_BATCH_SIZE, Workload, load_in_one_of


def measure(model: Workload, pool: ThreadPoolExecutor, batch_size: int, seconds: float) -> Measurement:
    bodies = cycle(model.bodies())
    latencies_s: list[float] = []
    begun = time.perf_counter()
    while (before := time.perf_counter()) - begun < seconds:
        model(list(pool.map(model.decode, islice(bodies, batch_size))))
        latencies_s += [time.perf_counter() - before] * batch_size
    return summarize(latencies_s, time.perf_counter() - begun)


def main(workload: str, seconds: float, connections: list[int]) -> dict[str, Any]:
    model = load_in_one_of(1, workload)
    answers = [model([model.decode(body)])[0] for body in model.bodies()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        measurements = [vars(measure(model, pool, min(n, MAX_BATCH_SIZE), seconds)) for n in connections]
    return {"answers": answers, "measurements": measurements}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], float(sys.argv[2]), [int(n) for n in sys.argv[3:]])))
