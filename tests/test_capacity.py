"""The simulation of benchmarks/capacity.py agrees with theory where there is one, and its plans are the smallest."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.capacity import (
    Failures,
    Goal,
    Unreachable,
    curve,
    fewest,
    inputs,
    main,
    on_one_machine,
    parse,
    plan,
    simulated_s,
    smallest,
    spares,
)
from benchmarks.simulation import Costs, Load, Outage, Outcome, outages, simulate

#: A replica that takes 10 ms for one request at a time, which is sent to it when it is idle.
ONE_BY_ONE = Costs({1: 10.0}, max_batch_size=1, calls_ahead=0)
#: A replica that takes 50 ms for any call.
FLAT = Costs({1: 50.0, 32: 50.0})
WARM_UP_S = 10.0


def mean_ms_of_mmc(rate: float, service_ms: float, c: int) -> float:
    """Return the mean time in a queue with exponential times and ``c`` servers, by Erlang's formula."""
    load = rate * service_ms / 1e3
    waits = load**c / math.factorial(c) * c / (c - load)
    wait_probability = waits / (sum(load**k / math.factorial(k) for k in range(c)) + waits)
    return service_ms + wait_probability * service_ms / (c - load)


@pytest.mark.parametrize(
    ("costs", "rate", "n_replicas", "expected_ms"),
    [
        pytest.param(ONE_BY_ONE, 70, 1, 10 + 10 * 0.7 / (2 * 0.3), id="M/D/1"),
        pytest.param(replace(ONE_BY_ONE, variation=1), 60, 1, mean_ms_of_mmc(60, 10, 1), id="M/M/1"),
        pytest.param(replace(ONE_BY_ONE, variation=1), 320, 4, mean_ms_of_mmc(320, 10, 4), id="M/M/4"),
        pytest.param(
            Costs({1: 0.0}, web_ms=10, web_variation=1, web_cores=3, max_batch_size=1),
            225,
            1,
            mean_ms_of_mmc(225, 10, 3),
            id="M/M/3, cores of a server",
        ),
    ],
)
def test_mean_latency_is_that_of_queueing_theory(
    costs: Costs, rate: float, n_replicas: int, expected_ms: float
) -> None:
    outcome = simulate(costs, Load(rate), 1, n_replicas, seconds=40_000 / rate)

    assert outcome.mean_ms(WARM_UP_S) == pytest.approx(expected_ms, rel=0.05)


def test_percentile_of_exponential_times_is_that_of_queueing_theory() -> None:
    outcome = simulate(replace(ONE_BY_ONE, variation=1), Load(50), 1, 1, seconds=800)

    assert outcome.percentile_ms(95, WARM_UP_S) == pytest.approx(-math.log(0.05) * 1e3 / (100 - 50), rel=0.05)


def told(outcome: Outcome) -> tuple[list[float], list[float]]:
    return outcome.arrived_s.tolist(), outcome.latency_ms.tolist()


def test_same_seed_gives_the_same_and_another_seed_another_outcome() -> None:
    first, again, other = (simulate(FLAT, Load(100), 2, 2, seconds=2, seed=seed) for seed in (7, 7, 8))

    assert told(first) == told(again)
    assert told(first) != told(other)


def test_request_to_an_idle_replica_does_not_wait_for_others() -> None:
    outcome = simulate(FLAT, Load(0.5), 1, 1, seconds=60)

    assert outcome.percentile_ms(50) == pytest.approx(50)
    assert outcome.mean_batch == 1


def test_what_waits_goes_out_as_one_call_up_to_the_largest_batch() -> None:
    # One of 64 clients begins; of the 63 that wait, 32 share the next call, and so on.
    outcome = simulate(FLAT, Load(clients=64), 1, 1, seconds=20)

    assert outcome.requests_per_s(1) == pytest.approx(32 / 0.05, rel=0.01)


def test_calls_of_several_servers_wait_for_each_other_at_the_replicas() -> None:
    alone = simulate(FLAT, Load(400), 1, 2, seconds=10)
    among_four = simulate(FLAT, Load(400), 4, 2, seconds=10)

    # A server's call has what waits there alone: calls are as many, but more of them wait at a time.
    assert among_four.mean_ms(1) > 1.5 * alone.mean_ms(1)
    assert among_four.requests_per_s(1) == pytest.approx(alone.requests_per_s(1), rel=0.02)


def test_way_to_a_replica_costs_it_time_unless_another_call_is_there_already() -> None:
    far = replace(FLAT, network_ms=50, max_batch_size=1, calls_ahead=0)

    one, two = (simulate(far, Load(clients=8), n_servers, 1, seconds=20) for n_servers in (1, 2))
    ahead = simulate(replace(far, calls_ahead=1), Load(clients=8), 1, 1, seconds=20)

    assert one.requests_per_s(1) == pytest.approx(10, rel=0.05)
    assert two.requests_per_s(1) == pytest.approx(20, rel=0.05)
    assert ahead.requests_per_s(1) == pytest.approx(20, rel=0.05)


def test_only_full_calls_go_out_ahead_of_time() -> None:
    costs = replace(FLAT, network_ms=2, max_batch_size=8)

    few, many = (simulate(costs, Load(clients=n), 1, 1, seconds=20) for n in (6, 24))

    assert few.mean_batch == pytest.approx(6, abs=0.1)
    assert few.utilisation < 0.97
    assert many.mean_batch == 8
    assert many.utilisation > 0.99


def test_servers_and_the_way_to_replicas_share_the_cores_of_one_machine() -> None:
    costs = replace(FLAT, web_ms=5, engine_ms=5, network_ms=10, max_batch_size=1)

    apart, together = (
        simulate(replace(costs, shared_cores=n), Load(clients=40), 1, 20, seconds=10).requests_per_s(1) for n in (0, 1)
    )

    assert apart == pytest.approx(200, rel=0.05)
    assert together == pytest.approx(1e3 / (5 + 5 + 10), rel=0.05)


def test_less_waits_at_the_replicas_where_each_server_has_its_part_of_the_calls() -> None:
    shared, free = (replace(FLAT, calls_per_replica=n) for n in (2, 8))

    for_each_two, for_each_eight = (simulate(costs, Load(400), 8, 4, seconds=10) for costs in (shared, free))

    assert for_each_two.mean_ms(1) < 0.7 * for_each_eight.mean_ms(1)


def test_engine_makes_one_call_after_the_other() -> None:
    costs = replace(ONE_BY_ONE, call_ms=5)

    outcome = simulate(costs, Load(clients=50), n_servers=1, n_replicas=20, seconds=10)

    assert outcome.requests_per_s(1) == pytest.approx(200, rel=0.02)


def test_on_one_machine_all_but_the_replicas_own_time_takes_its_cores() -> None:
    costs = replace(FLAT, web_ms=3, engine_ms=2, call_ms=1, network_ms=1, max_batch_size=1)

    alone = {"requests_per_s": 20.0, "items_a_call": 1.0, "cores_busy": 0.5 + 20 * 0.030}  # 30 ms, not 3 + 2 + 1 + 9
    there = on_one_machine(costs, {"cores": 2, "idle_cores": 0.5, "remote_ms": 9}, alone)

    outcome = simulate(there, Load(clients=200), 1, 50, seconds=10)
    assert outcome.requests_per_s(1) == pytest.approx(1.5 / 0.030, rel=0.05)


def test_calls_of_a_node_that_fails_are_made_again_and_every_request_is_answered() -> None:
    outcome = simulate(FLAT, Load(200), 2, 3, seconds=6, node_outages=[[Outage(2.0, 4.0)]])

    assert outcome.n_calls_lost >= 1
    assert len(outcome.latency_ms) == outcome.n_arrived
    assert 1000 < outcome.percentile_ms(100) < 1400  # learned of after a second, and made again


def test_request_waits_while_the_only_node_is_down() -> None:
    outcome = simulate(FLAT, Load(20), 1, 1, seconds=4, node_outages=[[Outage(1.0, 3.0)]])
    waited = outcome.latency_ms[(outcome.arrived_s > 1.1) & (outcome.arrived_s < 1.5)]

    assert waited.min() > 1500
    assert len(outcome.latency_ms) == outcome.n_arrived


def test_nodes_that_all_fail_for_good_are_refused() -> None:
    with pytest.raises(ValueError, match="every node fails for good"):
        simulate(FLAT, Load(20), 1, 1, seconds=4, node_outages=[[Outage(1.0, math.inf)]])


def test_nodes_are_up_for_the_part_of_the_time_that_was_asked_for() -> None:
    nodes = outages(200, mtbf_s=90, mttr_s=10, seconds=10_000, seed=1)

    down_s = sum(min(outage.up, 10_000) - outage.down for node in nodes for outage in node)

    assert down_s / (200 * 10_000) == pytest.approx(0.1, rel=0.03)


def test_bursts_keep_the_mean_rate_and_lengthen_the_tail() -> None:
    steady = simulate(FLAT, Load(300), 1, 1, seconds=200)
    bursty = simulate(FLAT, Load(300, burst=4, burst_s=0.5), 1, 1, seconds=200)

    assert bursty.n_arrived == pytest.approx(steady.n_arrived, rel=0.1)
    assert bursty.percentile_ms(99) > 2 * steady.percentile_ms(99)


def test_burst_that_leaves_no_mean_is_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and 10"):
        Load(100, burst=11)


def test_curve_is_interpolated_between_what_was_measured() -> None:
    assert np.allclose([Costs({1: 10, 9: 18}).replica_ms(n) for n in (1, 5, 9, 20)], [10, 14, 18, 18])


@pytest.mark.parametrize("limit", [1, 2, 3, 17, 40])
def test_fewest_is_the_smallest_that_meets_what_is_asked(limit: int) -> None:
    assert fewest(lambda n: n >= limit, 1, 40) == limit


def test_what_is_asked_of_no_more_than_the_most_is_told_to_be_unreachable() -> None:
    with pytest.raises(Unreachable):
        fewest(lambda n: n > 40, 1, 40)


@pytest.mark.parametrize(
    ("needed", "up", "availability", "expected"),
    [
        pytest.param(1, 0.99, 0.98, 0, id="one is enough"),
        pytest.param(1, 0.9, 0.98, 1, id="two of which one is up: 0.99"),
        pytest.param(2, 0.9, 0.95, 1, id="three of which two are up: 0.972"),
        pytest.param(2, 0.9, 0.98, 2, id="four of which two are up: 0.9963"),
        pytest.param(3000, 0.999, 0.9999, 11, id="many"),
        pytest.param(3, 1.0, 0.9999, 0, id="nothing ever fails"),
        pytest.param(30, 0.99, 1 - 1e-15, 12, id="nearly always"),
    ],
)
def test_spares_keep_as_many_up_as_are_needed(needed: int, up: float, availability: float, expected: int) -> None:
    assert spares(needed, up, availability) == expected


def test_plan_keeps_the_goal_and_one_replica_less_does_not() -> None:
    costs = replace(FLAT, web_ms=0.5, network_ms=2)

    found = plan(costs, Load(900), Goal(ms=200), Failures())

    less = simulate(costs, found.load, 2 * found.servers + 1, found.replicas - 1, seconds=30)
    assert found.outcome.percentile_ms(99, 1) <= 200 < less.percentile_ms(99, 1)
    assert found.servers >= 1
    assert found.failure.n_calls_lost >= 1


@pytest.mark.parametrize("availability", [-1, 0, 1, 99.99])
def test_availability_that_is_no_part_of_the_time_is_refused(availability: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        Goal(availability=availability)


@pytest.mark.parametrize(("mtbf_h", "mttr_min"), [(0, 10), (720, -1)])
def test_failures_that_cannot_be_are_refused(mtbf_h: float, mttr_min: float) -> None:
    with pytest.raises(ValueError, match="that cannot be"):
        Failures(mtbf_h, mttr_min)


def test_replicas_are_enough_if_a_number_of_servers_is_that_is_not_too_large() -> None:
    costs = replace(FLAT, web_ms=1.575, engine_ms=0.462, call_ms=7.785, network_ms=3.41)

    found = plan(costs, Load(100), Goal(ms=300), Failures())

    # With 3 servers, the calls of one replica are too many and too small.
    assert (found.servers, found.replicas) == (1, 1)


@pytest.mark.parametrize("n_servers", [12, 170])
def test_fewest_servers_are_found_among_those_that_are_enough(n_servers: int) -> None:
    costs = replace(FLAT, web_ms=10)
    rate = 100 * n_servers - 1

    found = smallest(lambda servers, replicas: n_servers * 1.2 < servers < n_servers * 1.5, costs, Load(rate), Goal())

    assert found[0] == n_servers * 1.2 // 1 + 1


def test_search_ends_where_no_number_keeps_the_goal() -> None:
    with pytest.raises(Unreachable):
        smallest(lambda servers, replicas: False, FLAT, Load(100), Goal())


@pytest.mark.parametrize("rate", [0.01, 1, 100, 1e5])
def test_as_many_requests_are_simulated_as_a_percentile_needs(rate: float) -> None:
    assert simulated_s(rate) * rate >= 1000


@pytest.mark.parametrize(
    ("option", "message"), [(["--availability", "99.99"], "between 0 and 1"), (["--rates", "0"], "must be some")]
)
def test_wrong_option_is_told(measured: Path, option: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["--inputs", str(measured), *option])


def test_goal_that_no_number_reaches_is_told() -> None:
    with pytest.raises(Unreachable, match=r"40 ms cannot be kept: a request that is alone takes 50 ms"):
        plan(FLAT, Load(20), Goal(ms=40), Failures())


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    file = tmp_path / "capacity.json"
    point = {"replicas": 2, "connections": 8, "max_batch_size": 1, "requests_per_s": 40.0}
    costs = {"curve_ms": {"1": 50}, "web_ms": 1.0}
    file.write_text(json.dumps({"source": "a test", "costs": costs, "measured": [point]}))
    return file


def test_options_replace_what_the_file_says(measured: Path) -> None:
    arguments = ["--inputs", str(measured), "--web-ms", "3", "--curve-ms", "1:5,8:9", "--goal-ms", "70"]

    costs, goal, failures, _ = inputs(parse(arguments))

    assert costs == Costs(curve("1:5,8:9"), web_ms=3)
    assert (goal, failures) == (Goal(ms=70), Failures())


def test_script_prints_the_plan_and_the_comparison(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--inputs", str(measured), "--rates", "30", "--goal-ms", "400"])

    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("| 30 | 1 | 1 + 1 | 1 + 1 |")]
    assert "| 2 | 8 | 1 | 40.0 | 40.0 | +0.0% |" in lines
