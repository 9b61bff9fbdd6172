"""Models on a Ray cluster of a head and two nodes, asked through real servers."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from PIL import Image

from tests.conftest import Server, encode_image
from tests.load import Load
from tests.ray.cluster import RayCluster
from tests.ray.conftest import NODES, StartServer, status
from tests.waiting import at_once, wait_until

ECHO, SLOW, FRAGILE, BROKEN = (
    f"/api/models/{model}/tasks/image_captioning/features"
    for model in ("fake_echo", "fake_slow", "fake_fragile", "fake_broken")
)


def ask(server: Server, path: str, width: int = 40) -> requests.Response:
    return server.post(path, {"image": encode_image(Image.new("RGB", (width, 9), "red"))})


def replicas(server: Server, model: str) -> list[dict[str, Any]]:
    return [one for one in status(server, model)["replicas"] if one["state"] == "running"]


def pids(server: Server, model: str) -> set[int]:
    return {one["pid"] for one in replicas(server, model)}


def is_stopped(server: Server, model: str) -> bool:
    return bool(status(server, model)["state"] == "stopped")


def stop(server: Server, *models: str) -> None:
    for model in models:
        server.post(f"/api/models/{model}/stop", {})
        wait_until(partial(is_stopped, server, model), f"the stop of {model}")


@pytest.fixture
def server(serve: StartServer) -> Iterator[Server]:
    """A server, whose models are deleted from the cluster afterwards."""
    started = serve()
    yield started
    stop(started, "fake_echo", "fake_slow", "fake_fragile")


def test_answers_come_from_a_replica_on_a_node_which_the_status_tells(server: Server) -> None:
    response = ask(server, FRAGILE)

    (replica,) = replicas(server, "fake_fragile")
    assert response.json() == [f"width 40 in process {replica['pid']}"]
    assert replica["node"] in NODES
    told = status(server, "fake_fragile")
    assert (told["state"], told["queue_depth"], told["consumer_type"]) == ("running", 0, "ray_consumer")
    assert 'fes_model_replicas{model="fake_fragile"} 1.0' in server.get("/metrics").text


@pytest.mark.parametrize(("width", "reason"), [(5, "five pixels wide"), (6, "six pixels wide")], ids=["raise", "exit"])
def test_what_a_function_raises_is_its_requests_error_and_the_replica_lives(
    server: Server, width: int, reason: str
) -> None:
    ask(server, FRAGILE)
    before = pids(server, "fake_fragile")

    response = ask(server, FRAGILE, width)

    assert (response.status_code, response.json()["code"]) == (500, "model_error")
    assert reason in response.json()["error"]
    assert ask(server, FRAGILE).json() == [f"width 40 in process {before.pop()}"]


def test_a_load_that_fails_is_a_503_with_the_models_own_words_and_the_node(server: Server) -> None:
    response = ask(server, BROKEN)

    assert (response.status_code, response.json()["code"]) == (503, "model_load_failed")
    assert "no weights here" in response.json()["error"]
    assert any(ip in response.json()["error"] for ip in NODES)
    assert "Retry-After" in response.headers


def test_requests_that_wait_go_out_as_one_call(server: Server) -> None:
    ask(server, SLOW)

    captions = at_once(16, lambda index: ask(server, SLOW, 100 + index).json()[0])

    assert [caption.split()[0] for caption in captions] == [str(100 + index) for index in range(16)]
    calls = {caption.partition("call ")[2] for caption in captions}
    assert len(calls) < 8


def test_a_second_server_finds_the_replicas_and_goes_on_when_the_first_is_killed(serve: StartServer) -> None:
    first, second = serve(), serve()
    ask(first, FRAGILE)
    before = pids(first, "fake_fragile")
    assert ask(second, FRAGILE).status_code == 200
    assert pids(second, "fake_fragile") == before
    engine = psutil.Process(status(first, "fake_fragile")["engine_pid"])
    drivers = engine.children(recursive=True)

    for process in (psutil.Process(first.process.pid), engine):
        process.kill()

    assert ask(second, FRAGILE).json() == [f"width 40 in process {next(iter(before))}"]
    psutil.wait_procs(drivers, 20)
    assert not any(driver.is_running() for driver in drivers)
    stop(second, "fake_fragile")


def test_a_stop_on_one_server_is_seen_by_all_and_the_next_request_starts_the_model(serve: StartServer) -> None:
    first, second = serve(), serve()
    ask(first, FRAGILE)
    ask(second, FRAGILE)
    before = pids(second, "fake_fragile")

    stop(first, "fake_fragile")

    wait_until(lambda: status(second, "fake_fragile")["state"] == "stopped")
    assert not any(psutil.pid_exists(pid) for pid in before)
    assert ask(second, FRAGILE).status_code == 200
    assert pids(second, "fake_fragile").isdisjoint(before)
    stop(second, "fake_fragile")


def test_a_server_with_other_settings_is_told_what_differs(server: Server, serve: StartServer) -> None:
    ask(server, SLOW)

    response = ask(serve(RAY_NUM_CPUS_FAKE_SLOW="0.5", FAKE_SECONDS="0.01"), SLOW)

    assert response.status_code == 503
    assert "FAKE_SECONDS is None, not '0.01', num_cpus is 1.0, not 0.5" in response.json()["error"]
    assert ask(server, SLOW).status_code == 200


def test_settings_of_a_model_reach_its_replicas(serve: StartServer) -> None:
    server = serve(FAKE_SECONDS="0.7")
    ask(server, SLOW)

    began = time.monotonic()
    ask(server, SLOW)

    assert time.monotonic() - began >= 0.7
    stop(server, "fake_slow")


def test_where_no_node_has_room_the_503_says_what_was_asked_for_and_what_there_is(serve: StartServer) -> None:
    server = serve(RAY_NUM_GPUS_FAKE_ECHO="1", RAY_RESOURCES='{"big": 2}', RAY_PLACEMENT_TIMEOUT="0.5")

    response = ask(server, ECHO)

    assert (response.status_code, response.json()["code"]) == (503, "model_load_failed")
    assert "which takes CPU: 1.0, GPU: 1.0, big: 2.0" in response.json()["error"]
    for ip in NODES:
        assert f"{ip} (CPU: 2 of 2 free)" in response.json()["error"]


def test_a_node_that_lacks_the_plugin_is_named_and_gets_it_where_plugins_are_shipped(
    serve: StartServer, cluster: RayCluster
) -> None:
    before = set(Path(tempfile.gettempdir()).glob("fes-modules-*"))
    cluster.start_node("127.0.0.5", 1, '--resources={"bare": 1}', plugins=[])
    try:
        bare = {"RAY_RESOURCES_FAKE_ECHO": '{"bare": 1}'}

        response = ask(serve(**bare), ECHO)

        assert response.status_code == 503
        assert "on the node 127.0.0.5, there is no module feature_extraction_server" in response.json()["error"]
        shipping = serve(**bare, RAY_SHIP_PLUGINS="true")
        assert ask(shipping, ECHO).json() == ["40x9 (255, 0, 0)"]
        assert replicas(shipping, "fake_echo")[0]["node"] == "127.0.0.5"
        assert set(Path(tempfile.gettempdir()).glob("fes-modules-*")) <= before
        stop(shipping, "fake_echo")
    finally:
        cluster.kill("127.0.0.5")


# What dies


def test_a_killed_replica_costs_no_request(serve: StartServer) -> None:
    server = serve(RAY_MIN_REPLICAS="2", RAY_MAX_REPLICAS="2", FAKE_SECONDS="0.05")
    ask(server, FRAGILE)
    wait_until(lambda: len(pids(server, "fake_fragile")) == 2)
    with Load(server, FRAGILE, 8) as load:
        load.wait_for_successes(16)
        before = pids(server, "fake_fragile")

        os.kill(next(iter(before)), signal.SIGKILL)

        load.wait_for_successes(64)
        wait_until(lambda: len(pids(server, "fake_fragile") - before) == 1)
    assert load.labels().keys() == {"200"}
    stop(server, "fake_fragile")


def test_a_request_that_kills_replicas_is_a_503_and_its_neighbours_are_answered(server: Server) -> None:
    ask(server, FRAGILE)
    with ThreadPoolExecutor(4) as pool:
        culprit = pool.submit(ask, server, FRAGILE, 2)
        others = [pool.submit(ask, server, FRAGILE, 40 + index) for index in range(3)]

    assert (culprit.result().status_code, culprit.result().json()["code"]) == (503, "model_unavailable")
    assert [other.result().status_code for other in others] == [200] * 3


def test_a_replica_that_hangs_is_replaced(serve: StartServer) -> None:
    server = serve(REQUEST_TIMEOUT="1.5", RESULT_CHECK_INTERVAL="0.05")
    server.post("/api/models/fake_fragile/start", {})
    wait_until(lambda: status(server, "fake_fragile")["state"] == "running")
    before = pids(server, "fake_fragile")

    response = ask(server, FRAGILE, 4)

    assert response.status_code == 504
    wait_until(lambda: bool(pids(server, "fake_fragile") - before))
    assert ask(server, FRAGILE).status_code == 200
    stop(server, "fake_fragile")


def test_a_killed_node_costs_no_request(serve: StartServer, cluster: RayCluster) -> None:
    cluster.start_node("127.0.0.6", 2, '--resources={"doomed": 2}')
    server = serve(RAY_MIN_REPLICAS="4", RAY_MAX_REPLICAS="4")
    ask(server, FRAGILE)
    wait_until(lambda: len(pids(server, "fake_fragile")) == 4)
    with Load(server, FRAGILE, 8) as load:
        load.wait_for_successes(32)
        doomed = next(
            ip for ip in ("127.0.0.6", NODES[0]) if ip in {r["node"] for r in replicas(server, "fake_fragile")}
        )

        cluster.kill(doomed)

        load.wait_for_successes(64)
    assert load.labels().keys() == {"200"}
    stop(server, "fake_fragile")
    if doomed == "127.0.0.6":
        return
    cluster.kill("127.0.0.6")
    cluster.start_node(doomed, 2)
