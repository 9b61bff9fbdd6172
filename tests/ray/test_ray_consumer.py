"""Models on a Ray cluster of a head and two nodes, asked through real servers."""

from __future__ import annotations

import re
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.conftest import Server
from tests.ray.cluster import RayCluster
from tests.ray.conftest import BARE_IP, NODES, ServeUntil
from tests.ray.servers import (
    BROKEN,
    ECHO,
    FLAKY,
    FRAGILE,
    SLOW,
    SLOW_S,
    ask,
    driver_of,
    has_state,
    pids,
    pids_of_fragile,
    replicas,
    start_model,
    status,
    stop_model,
)
from tests.waiting import at_once, wait_until


def test_answers_come_from_replicas_on_nodes_which_the_status_tells(first: Server) -> None:
    numbers = pids_of_fragile(first)

    response = ask(first, FRAGILE)

    assert response.json() in [[f"width 40 in process {pid}"] for pid in numbers]
    told = status(first, "fake_fragile")
    assert {replica["node"] for replica in told["replicas"]} <= set(NODES)
    assert (told["state"], told["queue_depth"], told["consumer_type"]) == ("running", 0, "ray_consumer")
    assert 'fes_model_replicas{model="fake_fragile"} 2.0' in first.get("/metrics").text


@pytest.mark.parametrize(("width", "reason"), [(5, "five pixels wide"), (6, "six pixels wide")], ids=["raise", "exit"])
def test_what_a_function_raises_is_its_requests_error_and_the_replica_lives(
    first: Server, width: int, reason: str
) -> None:
    before = pids_of_fragile(first)

    response = ask(first, FRAGILE, width)

    assert (response.status_code, response.json()["code"]) == (500, "model_error")
    assert reason in response.json()["error"]
    assert ask(first, FRAGILE).status_code == 200
    assert pids_of_fragile(first) == before


def test_a_load_that_fails_is_a_503_with_the_models_own_words_and_the_node(first: Server) -> None:
    response = ask(first, BROKEN)

    assert (response.status_code, response.json()["code"]) == (503, "model_load_failed")
    assert "no weights here" in response.json()["error"]
    assert any(ip in response.json()["error"] for ip in NODES)
    assert "Retry-After" in response.headers


def test_requests_that_wait_go_out_as_one_call(first: Server) -> None:
    start_model(first, "fake_slow")

    captions = at_once(16, lambda index: ask(first, SLOW, 100 + index).json()[0])

    assert [caption.split()[0] for caption in captions] == [str(100 + index) for index in range(16)]
    calls = {caption.partition("call ")[2] for caption in captions}
    assert len(calls) < 8


def test_settings_of_a_model_reach_its_replicas_and_a_server_with_others_is_told_what_differs(
    first: Server, second: Server
) -> None:
    start_model(first, "fake_slow")
    second.post("/api/models/fake_slow/start", {})  # which may take longer than its requests wait
    wait_until(lambda: has_state(second, "fake_slow", "failed"), "the comparison")

    response = ask(second, SLOW)

    assert response.status_code == 503
    differences = f"FAKE_SECONDS is '{SLOW_S}', not '0.01', num_cpus is 1.0, not 0.5"
    assert differences in response.json()["error"]
    began = time.monotonic()
    assert ask(first, SLOW).status_code == 200
    assert time.monotonic() - began >= SLOW_S
    stop_model(first, "fake_slow")


def test_replicas_with_other_settings_refuse_a_server_that_has_not_seen_that_its_own_were_stopped(
    first: Server, second: Server, serving: ServeUntil
) -> None:
    start_model(first, "fake_slow")
    with serving() as stopping:
        start_model(stopping, "fake_slow")
        driver = driver_of(first, "fake_slow")
        driver.suspend()  # so that it sees neither the stop nor the start
        stop_model(stopping, "fake_slow")
        start_model(second, "fake_slow")

        driver.resume()

        assert ask(first, SLOW).status_code == 503
    wait_until(lambda: "with other settings" in ask(first, SLOW).text, "the difference")
    assert ask(second, SLOW).status_code == 200
    stop_model(second, "fake_slow")


def test_a_stop_on_one_server_is_seen_by_all_and_requests_to_any_start_the_model_once(
    first: Server, second: Server
) -> None:
    before = pids_of_fragile(first)
    assert pids_of_fragile(second) == before

    stop_model(second, "fake_fragile")

    wait_until(lambda: has_state(first, "fake_fragile", "stopped"))
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in before), "the end of the processes")
    # Both deploy the model in the same instant. A request to the second one may not take long: it asks to start it.
    at_once(2, lambda index: start_model((first, second)[index], "fake_fragile"))
    assert ask(first, FRAGILE).status_code == ask(second, FRAGILE).status_code == 200
    after = pids_of_fragile(first)
    assert after.isdisjoint(before)
    assert pids_of_fragile(second) == after


def test_a_stop_on_one_server_lets_the_others_finish_what_they_have_under_way(serving: ServeUntil) -> None:
    settings = {"RAY_APP_PREFIX": "stopped_elsewhere", "FAKE_SECONDS": "5", "STOP_GRACE_PERIOD": "60"}
    with serving(**settings) as stopping, serving(**settings) as asked, ThreadPoolExecutor(1) as pool:
        start_model(stopping, "fake_slow")
        start_model(asked, "fake_slow")
        response = pool.submit(ask, asked, SLOW)
        wait_until(lambda: status(asked, "fake_slow")["running_jobs"] == 1, "the call")

        stopping.post("/api/models/fake_slow/stop", {})

        wait_until(lambda: status(asked, "fake_slow")["state"] in ("stopping", "stopped"), "the news of the stop")
        assert response.result().status_code == 200, response.result().text
        wait_until(lambda: all(has_state(server, "fake_slow", "stopped") for server in (stopping, asked)))


def test_a_call_that_hangs_is_given_up_after_the_grace_period_of_a_stop_on_another_server(
    first: Server, second: Server
) -> None:
    pids_of_fragile(first)
    pids_of_fragile(second)
    with ThreadPoolExecutor(1) as pool:
        response = pool.submit(ask, first, FRAGILE, 4)
        wait_until(lambda: status(first, "fake_fragile")["running_jobs"] == 1, "the call")

        stop_model(second, "fake_fragile")

        assert response.result().status_code == 503
        assert "was stopped" in response.result().json()["error"]
    wait_until(lambda: has_state(first, "fake_fragile", "stopped"))


def test_a_model_that_may_be_without_a_replica_gets_one_when_it_is_asked(serving: ServeUntil) -> None:
    with serving(RAY_APP_PREFIX="from_zero", RAY_MIN_REPLICAS_FAKE_FLAKY="0") as server:
        assert ask(server, FLAKY).status_code == 200
        assert len(replicas(server, "fake_flaky")) == 1
        stop_model(server, "fake_flaky")


def test_where_no_node_has_room_the_503_says_what_was_asked_for_and_what_there_is(second: Server) -> None:
    wait_until(lambda: has_state(second, "fake_flaky", "failed"))

    response = ask(second, FLAKY)

    assert (response.status_code, response.json()["code"]) == (503, "model_unavailable")
    assert "which takes CPU: 1.0, GPU: 1.0, big: 2.0" in response.json()["error"]
    for ip in NODES:
        assert re.search(rf"{re.escape(ip)} \(CPU: [0-2] of 2 free\)", response.json()["error"])


def test_a_node_that_lacks_the_plugin_is_named_and_keeps_what_was_shipped_when_the_server_is_killed(
    first: Server, serving: ServeUntil, cluster: RayCluster
) -> None:
    before = set(Path(tempfile.gettempdir()).glob("fes-modules-*"))
    cluster.start_node(BARE_IP, 1, resources={"bare": 1}, plugins=[])

    response = ask(first, ECHO)

    assert response.status_code == 503
    assert f"on the node {BARE_IP}, there is no module feature_extraction_server" in response.json()["error"]
    with serving(RAY_SHIP_PLUGINS="true") as shipping:
        assert ask(shipping, ECHO).json() == ["40x9 (255, 0, 0)"]
        (replica,) = replicas(shipping, "fake_echo")
        assert replica["node"] == BARE_IP
        assert set(Path(tempfile.gettempdir()).glob("fes-modules-*")) <= before
        wait_until(lambda: ask(first, ECHO).status_code == 200, "the replica that is there now")
        engine = psutil.Process(status(shipping, "fake_echo")["engine_pid"])
        drivers = engine.children(recursive=True)

        for process in (psutil.Process(shipping.process.pid), engine):
            process.kill()

    assert ask(first, ECHO).status_code == 200
    assert replicas(first, "fake_echo") == [replica]
    assert psutil.wait_procs(drivers, 60)[1] == []
    psutil.Process(replica["pid"]).kill()
    wait_until(lambda: ask(first, ECHO).status_code == 200, "the replica that comes in its place")
    wait_until(lambda: bool(pids(first, "fake_echo") - {replica["pid"]}), "its number")
    stop_model(first, "fake_echo")
    cluster.kill(BARE_IP)
