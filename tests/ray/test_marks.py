"""What is noted in the head's store of a call that is run again."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import psutil

MARKS = """
import sys
from types import SimpleNamespace
import psutil, ray
from feature_extraction_server.consumers.ray_consumer import replica as module
from feature_extraction_server.consumers.ray_consumer.replica import Replica, note_begin, was_running
in_time, module.HEAD_TIMEOUT_S = module.HEAD_TIMEOUT_S, 60  # Ray has just begun, on a machine that may be busy
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error", _temp_dir=sys.argv[1])
note_begin("run")
print(was_running("run"), was_running("run"), was_running("other"), flush=True)
replica = Replica("fake_echo", {}, "ERROR", 1)
replica._module = SimpleNamespace(look=lambda: was_running("under way"), end=lambda: None)
print(replica._run("look", (), {}, None, "under way"), replica._run("end", (), {}, None, "ended"), was_running("ended"))
sys.stdout.flush()
head = next(one for one in psutil.Process().children(recursive=True) if "gcs_server" in one.name())
head.kill()
head.wait()
module.HEAD_TIMEOUT_S = in_time
note_begin("without a head")
print(was_running("without a head"), flush=True)
"""


def test_a_call_is_noted_while_it_is_run_and_a_lost_head_keeps_none_waiting() -> None:
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_USAGE_STATS_ENABLED": "0"}
    with (
        tempfile.TemporaryDirectory(prefix="r-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        subprocess.Popen(
            [sys.executable, "-c", MARKS, folder], stdout=subprocess.PIPE, text=True, env=os.environ | environment
        ) as process,
    ):
        assert process.stdout is not None
        try:
            assert process.stdout.readline().split() == ["True", "False", "False"]
            assert process.stdout.readline().strip() == "(True, True) (True, None) False"
            # Where Ray's own limits hold, the process is ended before it says any more.
            assert process.stdout.readline().split() == ["None"]
        finally:
            for one in psutil.Process(process.pid).children(recursive=True):
                one.kill()
            process.kill()
