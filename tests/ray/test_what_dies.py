"""Replicas, a node and the head die while requests come. In this order: each test leaves less of the cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil

from tests.conftest import Server
from tests.load import Load
from tests.ray.cluster import HEAD_IP, RayCluster
from tests.ray.conftest import NODES, ServeUntil
from tests.ray.servers import FRAGILE, ask, driver_of, pids, pids_of_fragile, replicas, start_model, status
from tests.waiting import wait_until

JOBS = "/api/tasks/image_captioning/models/fake_fragile/jobs"
#: As anybody may do it who shares the cluster.
SHUTDOWN = """
import sys
import ray
from ray import serve
ray.init(address=sys.argv[1], _node_ip_address=sys.argv[2], log_to_driver=False, logging_level="error")
serve.shutdown()
"""


def test_a_killed_replica_costs_no_request(first: Server) -> None:
    before = pids_of_fragile(first)
    with Load(first, FRAGILE, 8) as load:
        load.wait_for_successes(16)

        os.kill(next(iter(before)), signal.SIGKILL)

        load.wait_for_successes(64)
        wait_until(lambda: len(pids(first, "fake_fragile") - before) == 1, "another replica")
    assert load.labels().keys() == {"200"}


def test_a_request_that_kills_replicas_is_a_503_and_its_neighbours_are_answered(first: Server) -> None:
    pids_of_fragile(first)
    with ThreadPoolExecutor(4) as pool:
        culprit = pool.submit(ask, first, FRAGILE, 2)
        others = [pool.submit(ask, first, FRAGILE, 40 + index) for index in range(3)]

    assert (culprit.result().status_code, culprit.result().json()["code"]) == (503, "model_unavailable")
    assert culprit.result().json()["error"].startswith("3 replicas of the model fake_fragile died of this request")
    assert [other.result().status_code for other in others] == [200] * 3


def test_requests_that_kill_replicas_again_and_again_cost_those_that_wait_there_nothing(
    first: Server, second: Server
) -> None:
    pids_of_fragile(first)
    pids_of_fragile(second)
    with ThreadPoolExecutor(9) as pool:
        culprits = [pool.submit(ask, second, FRAGILE, 2) for _ in range(4)]
        others = [pool.submit(ask, first, FRAGILE, 7) for _ in range(16)]

    assert all(culprit.result().status_code in (503, 504) for culprit in culprits)
    assert [other.result().text for other in others if other.result().status_code != 200] == []


def test_a_replica_that_hangs_is_replaced(first: Server, second: Server) -> None:
    before = pids_of_fragile(first)
    pids_of_fragile(second)

    response = ask(second, FRAGILE, 4)

    assert response.status_code == 504
    wait_until(lambda: bool(pids(first, "fake_fragile") - before), "another replica")
    assert ask(second, FRAGILE).status_code == 200


def test_a_replica_that_hangs_is_replaced_where_the_engine_that_asked_it_was_killed(
    first: Server, serving: ServeUntil
) -> None:
    before = pids_of_fragile(first)
    with serving() as server, ThreadPoolExecutor(1) as pool:
        start_model(server, "fake_fragile")
        pool.submit(ask, server, FRAGILE, 4)
        wait_until(lambda: status(server, "fake_fragile")["running_jobs"] == 1, "the call")

        psutil.Process(status(server, "fake_fragile")["engine_pid"]).kill()

        wait_until(lambda: bool(pids(first, "fake_fragile") - before), "another replica")


def test_a_killed_node_costs_no_request(first: Server, cluster: RayCluster) -> None:
    pids_of_fragile(first)
    with Load(first, FRAGILE, 8) as load:
        load.wait_for_successes(32)
        doomed = replicas(first, "fake_fragile")[0]["node"]

        cluster.kill(doomed)

        load.wait_for_successes(64)
    assert load.labels().keys() == {"200"}


def test_after_a_shutdown_of_ray_serve_the_next_requests_start_the_model_again(
    first: Server, cluster: RayCluster
) -> None:
    before = pids_of_fragile(first)
    driver = driver_of(first, "fake_fragile")

    driver.suspend()  # so that it does not see the applications go, but only that all is gone
    command = [sys.executable, "-c", SHUTDOWN, cluster.address, HEAD_IP]
    ended = subprocess.run(command, env=os.environ | cluster.environment)
    driver.resume()

    assert ended.returncode == 0
    wait_until(lambda: ask(first, FRAGILE).status_code == 200, "an answer")
    assert pids(first, "fake_fragile").isdisjoint(before)


def test_a_lost_head_is_a_503_until_it_is_back_which_stored_jobs_wait_for(first: Server, cluster: RayCluster) -> None:
    assert ask(first, FRAGILE).status_code == 200
    before = pids(first, "fake_fragile")

    cluster.kill(HEAD_IP)

    wait_until(lambda: ask(first, FRAGILE).status_code == 503, "a 503")
    response = ask(first, FRAGILE)
    assert response.json()["code"] == "model_unavailable"
    assert "Retry-After" in response.headers

    cluster.kill(*cluster.ips)
    wait_until(lambda: "no Ray cluster answers" in ask(first, FRAGILE).text, "a load that fails")
    job = f"/api/jobs/{ask(first, JOBS).json()['id']}"
    cluster.start_head()
    cluster.start_node(NODES[0], 2)
    wait_until(lambda: ask(first, FRAGILE).status_code == 200, "an answer")
    wait_until(lambda: first.get(job).json()["ended"] is not None, "the end of the job")
    assert first.get(job).json()["state"] == "succeeded", first.get(job).json()["error"]
    assert pids(first, "fake_fragile").isdisjoint(before)
