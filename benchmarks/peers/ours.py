"""This server, as its README starts it: web workers and one engine process.

python -m benchmarks.peers.ours PORT WORKLOAD PROCESSES
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ("apis-base_api", "tasks-zero_shot_image_classification")


def main(port: str, workload: str, n_processes: int) -> None:
    del workload  # models are loaded when they are first asked
    sources = [ROOT / "feature_extraction_server-core", ROOT / "benchmarks" / "plugins"]
    plugins = [ROOT / "plugins" / f"feature_extraction_server-{name}" for name in PLUGINS]
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, [*sources, *plugins, ROOT]))
    web_workers = str(n_processes - 1)
    command = [sys.executable, "-m", "gunicorn", "-c", str(ROOT / "gunicorn.conf.py")]
    os.execv(sys.executable, [*command, "-b", f"127.0.0.1:{port}", "-w", web_workers])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
