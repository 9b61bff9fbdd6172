"""Say how many servers and replicas a rate of requests needs, by simulation; write the answers to CAPACITY.md.

    python benchmarks/capacity.py --rates 500 --goal-ms 300 --percentile 99
    python benchmarks/capacity.py --curve-ms 1:12,8:30,32:90 --web-ms 14 --rates 200 2000
    python benchmarks/capacity.py --write          # the tables of CAPACITY.md, in minutes

What requests and calls cost is read from ``capacity.json``; each number may be given as an option instead.
``simulation.py`` beside this file says what is simulated.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.simulation import Costs, Load, Outage, Outcome, simulate  # noqa: E402 - the path is set above

BENCHMARKS: Final = ROOT / "benchmarks"
RATES: Final = (100, 1_000, 10_000, 100_000)
#: So many requests a simulation, but not for less than so many seconds.
N_REQUESTS: Final = 100_000
MIN_SECONDS: Final = 3.0
#: Nor for more, unless there would be fewer requests than a percentile needs.
MAX_SECONDS: Final = 60.0
LEAST_REQUESTS: Final = 1_000
WARM_UP_S: Final = 1.0
SEEDS: Final = (1, 2, 3)
#: Every number of servers is tried up to so many that are needed, and about so many of them where it is more.
N_TRIED: Final = 16


class Unreachable(Exception):
    """No number of servers and replicas reaches the goal."""


@dataclass(frozen=True)
class Goal:
    """The latency that a percentile of the requests may have, and the part of the time that it must be kept."""

    ms: float = 300.0
    percentile: float = 99.0
    availability: float = 0.9999

    def __post_init__(self) -> None:
        if not 0 < self.availability < 1:
            raise ValueError(f"availability is {self.availability:g}: it must be between 0 and 1, as 0.999 is")


@dataclass(frozen=True)
class Failures:
    """How long a node runs between failures, and how long until its replicas are ready again, on average."""

    mtbf_h: float = 720.0
    mttr_min: float = 10.0

    def __post_init__(self) -> None:
        if not (self.mtbf_h > 0 and self.mttr_min >= 0):
            raise ValueError(f"a node fails every {self.mtbf_h:g} h for {self.mttr_min:g} minutes: that cannot be")

    @property
    def up(self) -> float:
        """The part of the time that a node is up."""
        return self.mtbf_h / (self.mtbf_h + self.mttr_min / 60)


@dataclass(frozen=True)
class Plan:
    """The fewest replicas that keep the goal, then the fewest servers that do with so many, and what fails beside."""

    load: Load
    servers: int
    replicas: int
    calls: int  # that a server may have under way
    outcome: Outcome
    spare_servers: int
    nodes: int
    spare_nodes: int
    #: A node fails that is not spare any more: what it delays, until the next node is there.
    failure: Outcome


def fewest(meets: Callable[[int], bool], at_least: int, at_most: int) -> int:
    """Return the smallest number that meets what is asked, where all larger ones do as well.

    Raises:
        Unreachable: none up to ``at_most`` does.
    """
    low, high, step = at_least, at_least, 1
    while not meets(high):
        if high == at_most:
            raise Unreachable
        low, high, step = high + 1, min(high + step, at_most), 2 * step
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle + 1, high)
    return high


def spares(needed: int, up: float, availability: float) -> int:
    """Return how many more there must be so that ``needed`` are up for this part of the time, each by itself."""
    if up == 1:
        return 0
    extra = 0
    while _too_few_up(needed, extra, up) > 1 - availability:
        extra += 1
    return extra


def _too_few_up(needed: int, extra: int, up: float) -> float:
    """Return the part of the time that more than ``extra`` are down: a sum that has no 1 in it to be rounded to."""
    n = needed + extra
    return math.fsum(
        math.exp(_log_choices(n, k) + (n - k) * math.log(up) + k * math.log1p(-up)) for k in range(extra + 1, n + 1)
    )


def _log_choices(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def least_replicas(costs: Costs, rate: float) -> int:
    """Return how many replicas do as many requests a second as come, none of them ever idle."""
    fastest = max(n / costs.replica_ms(n) for n in range(1, costs.max_batch_size + 1))
    return max(1, math.ceil(rate / 1e3 / fastest))


def least_servers(costs: Costs, rate: float) -> int:
    """Return how many servers do their part for as many requests a second as come, in the largest calls."""
    engine_ms = costs.engine_ms + costs.call_ms / costs.max_batch_size
    return max(1, math.ceil(rate / 1e3 * max(costs.web_ms / costs.web_cores, engine_ms)))


def plan(costs: Costs, load: Load, goal: Goal, failures: Failures) -> Plan:
    """Return what a load needs.

    Raises:
        Unreachable: the goal is too near to what a request takes that is alone.
    """
    seconds = simulated_s(load.requests_per_s)

    @cache
    def kept(servers: int, replicas: int) -> bool:
        outcomes = (simulate(costs, load, servers, replicas, seconds, seed) for seed in SEEDS)
        return all(outcome.percentile_ms(goal.percentile, WARM_UP_S) <= goal.ms for outcome in outcomes)

    servers, replicas = smallest(kept, costs, load, goal)
    nodes = math.ceil(replicas / costs.replicas_per_node)
    failure = simulate(
        costs, load, servers, replicas + costs.replicas_per_node, seconds, SEEDS[0], [[Outage(seconds / 2, math.inf)]]
    )
    return Plan(
        load,
        servers,
        replicas,
        costs.calls_of_a_server(servers, replicas),
        simulate(costs, load, servers, replicas, seconds, SEEDS[0]),
        spares(servers, failures.up, goal.availability),
        nodes,
        spares(nodes, failures.up, goal.availability),
        failure,
    )


def simulated_s(rate: float) -> float:
    """Return for how long to simulate a rate of requests."""
    if rate <= 0:
        raise ValueError(f"{rate:g} requests a second: there must be some")
    return WARM_UP_S + max(MIN_SECONDS, min(MAX_SECONDS, N_REQUESTS / rate), LEAST_REQUESTS / rate)


def smallest(kept: Callable[[int, int], bool], costs: Costs, load: Load, goal: Goal) -> tuple[int, int]:
    """Return the fewest replicas, and the fewest servers with so many, for which ``kept(servers, replicas)`` holds.

    More replicas are never worse. More servers may be: each makes smaller calls, and more of them wait at the replicas.

    Raises:
        Unreachable: there are none.
    """
    n_servers, n_replicas = (least(costs, load.requests_per_s) for least in (least_servers, least_replicas))
    step = math.ceil(n_servers / N_TRIED)
    tried = range(n_servers, 2 * n_servers + 2, step)
    try:
        replicas = fewest(lambda n: any(kept(servers, n) for servers in tried), n_replicas, 10 * n_replicas + 10)
    except Unreachable:
        alone = costs.web_ms + costs.engine_ms + costs.call_ms + costs.network_ms + costs.replica_ms(1)
        raise Unreachable(f"{goal.ms:g} ms cannot be kept: a request that is alone takes {alone:.3g} ms") from None
    enough = next(servers for servers in tried if kept(servers, replicas))
    return fewest(lambda n: kept(n, replicas), max(n_servers, enough - step + 1), enough), replicas


# What is read and written


def table(plans: Sequence[Plan], goal: Goal) -> list[str]:
    """Return the plans as a table in Markdown."""
    percentile = f"{goal.percentile:g} % ms"
    head = [
        "Requests/s",
        "Replicas",
        "Nodes + spare",
        "Servers + spare",
        "Calls a server",
        "Median ms",
        percentile,
        "Requests a call",
    ]
    head += ["Replicas busy", "Servers busy", "A failure delays", f"{percentile} then", "Slowest ms"]
    rows = []
    for one in plans:
        outcome, failure, half = one.outcome, one.failure, one.failure.seconds / 2
        row = [f"{one.load.requests_per_s:,g}", f"{one.replicas:,}"]
        row += [f"{one.nodes:,} + {one.spare_nodes}", f"{one.servers:,} + {one.spare_servers}"]
        row += [f"{one.calls}"]
        row += [f"{outcome.percentile_ms(part, WARM_UP_S):.0f}" for part in (50, goal.percentile)]
        row += [f"{outcome.mean_batch:.1f}", f"{outcome.utilisation:.0%}", f"{outcome.web_utilisation:.0%}"]
        row += [f"{failure.n_requests_lost}"]
        row += [f"{failure.percentile_ms(part, half - 0.1):.0f}" for part in (goal.percentile, 100)]
        rows.append(row)
    return markdown(head, rows)


def on_one_machine(costs: Costs, machine: dict[str, float], alone: dict[str, Any]) -> Costs:
    """Return the costs where servers, Ray and replicas share the cores of one machine.

    Args:
        machine: its ``cores``, how many of them are busy without any request (``idle_cores``), and the processor time
            that a call takes elsewhere than in the server (``remote_ms``).
        alone: what was measured of one replica. It tells how much processor time its calls really took.
    """
    n_items = alone["items_a_call"]
    told_ms = n_items * (costs.web_ms + costs.engine_ms) + costs.call_ms + machine["remote_ms"]
    taken_ms = 1e3 * (alone["cores_busy"] - machine["idle_cores"]) * n_items / alone["requests_per_s"]
    slower = taken_ms / told_ms * machine["cores"] / (machine["cores"] - machine["idle_cores"])
    return replace(
        costs,
        shared_cores=int(machine["cores"]),
        web_ms=slower * costs.web_ms,
        engine_ms=slower * costs.engine_ms,
        call_ms=slower * costs.call_ms,
        network_ms=slower * machine["remote_ms"],
    )


def comparison(measured: Sequence[dict[str, Any]], costs: Costs, machine: dict[str, float] | None) -> list[str]:
    """Return a table of what was measured, all on one ``machine``, and what the simulation says of the same load."""
    head = ["Replicas", "Connections", "Requests a call, at most", "Measured requests/s", "Simulated", "Off by"]
    rows = []
    for point in measured:
        size = point["max_batch_size"]
        same = replace(costs, max_batch_size=size)
        if machine is not None:
            alone = next(one for one in measured if (one["replicas"], one["max_batch_size"]) == (1, size))
            same = on_one_machine(same, machine, alone)
        load = Load(clients=point["connections"])
        outcome = simulate(same, load, n_servers=1, n_replicas=point["replicas"], seconds=21)
        simulated, wanted = outcome.requests_per_s(WARM_UP_S), point["requests_per_s"]
        numbers = [f"{point[key]}" for key in ("replicas", "connections", "max_batch_size")]
        rows.append([*numbers, f"{wanted:.1f}", f"{simulated:.1f}", f"{simulated / wanted - 1:+.1%}"])
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---:"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, default=BENCHMARKS / "capacity.json", help="what was measured")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="requests a second")
    parser.add_argument("--burst", type=float, default=1.0, help="how much higher the rate is in a tenth of the time")
    parser.add_argument("--write", action="store_true", help="write CAPACITY.md; else the tables are printed")
    parser.add_argument("--curve-ms", type=curve, help="milliseconds of a replica by requests a call, as in 1:12,32:90")
    for kind in (Goal, Failures, Costs):
        for one in fields(kind):
            if one.default is not MISSING:
                option = f"--goal-{one.name}" if kind is Goal and one.name == "ms" else f"--{one.name}"
                parser.add_argument(option.replace("_", "-"), type=type(one.default), dest=one.name)
    return parser.parse_args(arguments)


def curve(text: str) -> dict[int, float]:
    """Read a curve, as in ``1:12,32:90``."""
    pairs = [pair.split(":") for pair in text.split(",")]
    return {int(n): float(ms) for n, ms in pairs}


def inputs(options: argparse.Namespace) -> tuple[Costs, Goal, Failures, dict[str, Any]]:
    """Return the costs, of the file and the options, the goal, the failures, and the rest of the file."""
    known: dict[str, Any] = json.loads(options.inputs.read_text())
    told = {name: value for name, value in vars(options).items() if value is not None}

    def own(kind: type) -> dict[str, Any]:
        return {one.name: told[one.name] for one in fields(kind) if one.name in told}

    return costs_of(known["costs"] | own(Costs)), Goal(**own(Goal)), Failures(**own(Failures)), known


def costs_of(told: dict[str, Any]) -> Costs:
    """Return costs as a file tells them: there, the numbers of a curve's requests are texts."""
    return Costs(**told | {"curve_ms": {int(n): ms for n, ms in told["curve_ms"].items()}})


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    began = time.monotonic()
    try:
        costs, goal, failures, known = inputs(options)
        plans = [plan(costs, Load(rate, burst=options.burst), goal, failures) for rate in options.rates]
    except (Unreachable, ValueError) as error:
        sys.exit(f"capacity.py: {error}")
    asked = f"{goal.percentile:g} % of the requests answered within {goal.ms:g} ms, {goal.availability:.2%} of the time"
    lines = [
        f"* asked for: {asked}" + (f"; bursts of {options.burst:g} times the rate" if options.burst > 1 else ""),
        f"* a node fails every {failures.mtbf_h:g} h on average and is back after {failures.mttr_min:g} minutes",
        f"* costs: `{json.dumps(vars(costs))}`",
        f"* measured: {known['source']}",
        "",
        *table(plans, goal),
    ]
    if measured := known.get("measured"):
        compared = comparison(measured, costs_of(known["costs"]), known.get("machine"))
        lines += ["", "## Simulated and measured", "", *compared]
    if not options.write:
        sys.stdout.write("\n".join([*lines, ""]))
        return
    page = BENCHMARKS / "CAPACITY.md"
    head = page.read_text().split("## What is needed", 1)[0] if page.exists() else "# Capacity\n\n"
    took = f"Written by `benchmarks/capacity.py --write` in {time.monotonic() - began:.0f} s of simulation."
    page.write_text(head + "\n".join(["## What is needed", "", took, "", *lines, ""]))


if __name__ == "__main__":
    main()
