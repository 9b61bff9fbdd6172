"""A discrete-event simulation of servers that share the replicas of one model.

A request goes to one of the servers at random, is worked on there by a core (``web_ms``), and waits in that server's
queue for the model. As soon as the server may make one more call, its engine makes one of all that waits, the largest
batch at most (``engine_ms`` a request and ``call_ms`` a call, one call after the other); as many calls again may go out
ahead of time, but only full ones. The call travels
(``network_ms``, there and back) to the replica that has the fewest, waits for its turn there, and takes what the
replica's curve says for so many requests. If the replica's node fails meanwhile, the call is lost; its server learns of
that ``detection_ms`` later and makes it again, elsewhere.

With ``shared_cores``, all of that but the replica's own time takes cores of one machine, as where this was measured.

Equal arguments give equal results: all chance comes from the seed. ``capacity.py`` beside this file asks the questions.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import simpy

_Process = Generator[simpy.Event, Any, None]
#: Arrivals are drawn for this long ahead.
CHUNK_S: Final = 0.1
#: How much of the time a load that comes in bursts is high.
BURST_SHARE: Final = 0.1


@dataclass(frozen=True)
class Costs:
    """What one request and one call take, in milliseconds.

    Args:
        curve_ms: how long a replica takes for a call, by its number of requests; interpolated between those given.
        variation: the standard deviation of a replica's time in relation to its mean: 0 is constant, 1 is exponential.
        web_variation: the same of ``web_ms``.
        calls_per_replica: how many calls all servers together may have under way for each replica. A server may have
            its part of them, one at least, and no more than there are replicas.
        calls_ahead: how many more it may have for each of these, but only full ones.
        shared_cores: how many cores servers and the way to the replicas share; 0: each server has its own.
    """

    curve_ms: Mapping[int, float]
    web_ms: float = 0.0
    web_cores: int = 1
    engine_ms: float = 0.0
    call_ms: float = 0.0
    network_ms: float = 0.0
    detection_ms: float = 1000.0
    variation: float = 0.0
    web_variation: float = 0.0
    max_batch_size: int = 32
    calls_per_replica: float = 2.0
    calls_ahead: int = 1
    replicas_per_node: int = 1
    shared_cores: int = 0

    def calls_of_a_server(self, n_servers: int, n_replicas: int) -> int:
        """Return how many calls a server may have under way."""
        return max(1, min(n_replicas, round(self.calls_per_replica * n_replicas / n_servers)))

    def replica_ms(self, n: int) -> float:
        """Return how long a replica takes for ``n`` requests, on average."""
        sizes = sorted(self.curve_ms)
        return float(np.interp(n, sizes, [self.curve_ms[size] for size in sizes]))


@dataclass(frozen=True)
class Load:
    """Who asks: so many requests a second at random times, or (``clients``) a number of clients that each ask again
    when they are answered.

    ``burst`` is how much higher than its mean the rate is in a tenth of the time, for ``burst_s`` at a time on average.
    """

    requests_per_s: float = 0.0
    clients: int = 0
    burst: float = 1.0
    burst_s: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.burst <= 1 / BURST_SHARE:
            raise ValueError(f"burst is {self.burst}: it must be between 1 and {1 / BURST_SHARE:g}")


class Outage(NamedTuple):
    """When a node fails and when its replicas are ready again, in seconds from the start."""

    down: float
    up: float


def outages(n_nodes: int, mtbf_s: float, mttr_s: float, seconds: float, seed: int) -> list[list[Outage]]:
    """Return each node's outages within ``seconds``; times between them and their lengths are exponential."""
    chance = np.random.default_rng(seed)
    nodes: list[list[Outage]] = []
    for _ in range(n_nodes):
        node: list[Outage] = []
        down = chance.exponential(mtbf_s)
        while down < seconds:
            node.append(Outage(down, down + chance.exponential(mttr_s)))
            down = node[-1].up + chance.exponential(mtbf_s)
        nodes.append(node)
    return nodes


class Request(NamedTuple):
    ready: float  # when it may go to the model
    arrived: float


@dataclass(eq=False)
class Replica:
    outages: Sequence[Outage] = ()
    free_at: float = 0.0
    n_calls: int = 0  # that it works on, or has to

    def outage(self, start: float, end: float) -> Outage | None:
        """Return the first outage that falls into a stretch of time."""
        return next((outage for outage in self.outages if outage.down < end and outage.up > start), None)


@dataclass(eq=False)
class Server:
    cores: list[float]  # when each has done what it was given
    worker: simpy.Resource | None = None  # in place of these, where cores are shared
    coming: list[Request] = field(default_factory=list)  # a heap: what is ready first comes first
    waiting: deque[Request] = field(default_factory=deque)  # for the model
    n_calls: int = 0  # under way
    news: simpy.Event | None = None  # what its dispatcher waits for: a request, or the end of a call

    def take_ready(self, now: float) -> None:
        """Let what is ready wait for the model."""
        while self.coming and self.coming[0].ready <= now:
            self.waiting.append(heapq.heappop(self.coming))

    def ready_at(self, n: int) -> float:
        """Return when ``n`` requests wait, if none goes before."""
        missing = n - len(self.waiting)
        if missing > len(self.coming):
            return math.inf
        return heapq.nsmallest(missing, self.coming)[-1].ready if missing > 0 else 0.0

    def tell(self) -> None:
        if self.news is not None:
            self.news.succeed()
            self.news = None


@dataclass(frozen=True)
class Outcome:
    """What a simulation gave: of each request that was answered, when it came and after how many milliseconds."""

    arrived_s: np.ndarray[Any, np.dtype[np.float64]]
    latency_ms: np.ndarray[Any, np.dtype[np.float64]]
    n_arrived: int
    seconds: float
    mean_batch: float
    utilisation: float  # of the replicas
    web_utilisation: float  # of the servers' cores for ``web_ms``
    n_calls_lost: int
    n_requests_lost: int  # by lost calls; each was asked again

    def percentile_ms(self, percentile: float, after_s: float = 0.0) -> float:
        """Return a percentile of the latency of what came after ``after_s``."""
        chosen = self.latency_ms[self.arrived_s >= after_s]
        return float(np.percentile(chosen, percentile)) if len(chosen) else float("nan")

    def mean_ms(self, after_s: float = 0.0) -> float:
        return float(self.latency_ms[self.arrived_s >= after_s].mean())

    def requests_per_s(self, after_s: float = 0.0) -> float:
        """Return how many requests were answered a second, from ``after_s`` to the end of the load."""
        answered = self.arrived_s + self.latency_ms / 1e3
        return float(((answered >= after_s) & (answered < self.seconds)).sum() / (self.seconds - after_s))


def simulate(
    costs: Costs,
    load: Load,
    n_servers: int,
    n_replicas: int,
    seconds: float,
    seed: int = 0,
    node_outages: Sequence[Sequence[Outage]] = (),
) -> Outcome:
    """Simulate ``seconds`` of load. Of random arrivals all are answered, however long that takes afterwards.

    Raises:
        ValueError: every node fails for good, so that these would never be answered.
    """
    simulation = _Simulation(costs, load, n_servers, n_replicas, seconds, seed, node_outages)
    return simulation.run()


class _Simulation:
    def __init__(
        self,
        costs: Costs,
        load: Load,
        n_servers: int,
        n_replicas: int,
        seconds: float,
        seed: int,
        node_outages: Sequence[Sequence[Outage]],
    ) -> None:
        self.env = simpy.Environment()
        self.costs, self.load, self.seconds = costs, load, seconds
        self.arrivals, self.choices, self.web, self.service = np.random.default_rng(seed).spawn(4)
        self.servers = [Server([0.0] * costs.web_cores) for _ in range(n_servers)]
        self.cores = simpy.Resource(self.env, costs.shared_cores) if costs.shared_cores else None
        if self.cores is not None:
            for server in self.servers:
                server.worker = simpy.Resource(self.env, costs.web_cores)
        nodes = [*node_outages, *[()] * n_replicas]
        self.replicas = [Replica(nodes[number // costs.replicas_per_node]) for number in range(n_replicas)]
        if all(replica.outages and replica.outages[-1].up == math.inf for replica in self.replicas):
            raise ValueError("every node fails for good: requests would wait for ever")
        self.max_calls = costs.calls_of_a_server(n_servers, n_replicas)
        #: A heap of replicas by their number of calls, with entries that no longer hold.
        self.by_calls = [(0, number, replica) for number, replica in enumerate(self.replicas)]
        self.n_changes = n_replicas
        self.curve_s = [0.0] + [costs.replica_ms(n) / 1e3 for n in range(1, costs.max_batch_size + 1)]
        self.arrived_s, self.latency_s = array("d"), array("d")
        self.n_arrived = self.n_calls = self.n_sent = self.n_calls_lost = self.n_requests_lost = 0
        self.replica_s = self.web_s = 0.0

    def run(self) -> Outcome:
        for server in self.servers:
            self.env.process(self._dispatch(server))
        if self.load.clients:
            for client in range(self.load.clients):
                self._arrive(self.servers[client % len(self.servers)], 0.0)
            self.env.run(until=self.seconds)
        else:
            self.env.process(self._arrivals())
            self.env.run()
        return Outcome(
            np.array(self.arrived_s),
            1e3 * np.array(self.latency_s),
            self.n_arrived,
            self.seconds,
            self.n_sent / max(1, self.n_calls),
            self.replica_s / (len(self.replicas) * self.env.now),
            self.web_s / (len(self.servers) * self.costs.web_cores * self.env.now),
            self.n_calls_lost,
            self.n_requests_lost,
        )

    # Requests come

    def _phases(self) -> Iterator[tuple[float, float]]:
        """Yield rates, each with how long it lasts; the mean is the load's."""
        rate, burst, burst_s = self.load.requests_per_s, self.load.burst, self.load.burst_s
        if burst == 1:
            yield rate, self.seconds
            return
        low = rate * (1 - BURST_SHARE * burst) / (1 - BURST_SHARE)
        while True:
            yield low, self.arrivals.exponential(burst_s * (1 - BURST_SHARE) / BURST_SHARE)
            yield rate * burst, self.arrivals.exponential(burst_s)

    def _arrivals(self) -> _Process:
        for rate, left_s in self._phases():
            while left_s > 0 and self.env.now < self.seconds:
                chunk_s = min(CHUNK_S, left_s, self.seconds - self.env.now)
                times = self.env.now + chunk_s * np.sort(self.arrivals.random(self.arrivals.poisson(rate * chunk_s)))
                chosen = self.choices.integers(len(self.servers), size=len(times))
                for now, server in zip(times.tolist(), chosen.tolist(), strict=True):
                    self._arrive(self.servers[server], now)
                yield self.env.timeout(chunk_s)
                left_s -= chunk_s
            if self.env.now >= self.seconds:
                return

    def _arrive(self, server: Server, now: float) -> None:
        """Give a request to a server's first free core. It is ready for the model when that has done its part."""
        work_s = self._drawn(self.costs.web_ms / 1e3, self.costs.web_variation, self.web)
        self.n_arrived += 1
        self.web_s += work_s
        if server.worker is not None:
            self.env.process(self._work(server, server.worker, work_s, now))
            return
        ready = max(now, server.cores[0]) + work_s
        heapq.heapreplace(server.cores, ready)
        heapq.heappush(server.coming, Request(ready, now))
        server.tell()

    def _work(self, server: Server, worker: simpy.Resource, work_s: float, arrived: float) -> _Process:
        """Do a server's part of a request on one of the machine's cores."""
        yield self.env.timeout(max(0.0, arrived - self.env.now))
        with worker.request() as mine:
            yield mine
            yield from self._take_core(work_s)
        server.waiting.append(Request(self.env.now, arrived))
        server.tell()

    def _take_core(self, seconds: float) -> _Process:
        """Let time pass, with one of the machine's cores where these are shared."""
        if self.cores is None:
            yield self.env.timeout(seconds)
            return
        with self.cores.request() as core:
            yield core
            yield self.env.timeout(seconds)

    # Requests are answered

    def _dispatch(self, server: Server) -> _Process:
        """Make calls of what waits at one server: no call waits for more requests while one may be made."""
        largest = len(self.curve_s) - 1
        while True:
            server.take_ready(self.env.now)
            least = 1 if server.n_calls < self.max_calls else largest
            may_call = server.n_calls < (1 + self.costs.calls_ahead) * self.max_calls
            if not may_call or len(server.waiting) < least:
                server.news = self.env.event()
                ready_at = server.ready_at(least) if may_call else math.inf
                if ready_at < math.inf:
                    yield server.news | self.env.timeout(max(0.0, ready_at - self.env.now))
                else:
                    yield server.news
                continue
            batch = [server.waiting.popleft() for _ in range(min(largest, len(server.waiting)))]
            server.n_calls += 1
            if engine_ms := self.costs.call_ms + self.costs.engine_ms * len(batch):
                yield from self._take_core(engine_ms / 1e3)
            self.env.process(self._call(server, batch))

    def _call(self, server: Server, batch: list[Request]) -> _Process:
        way_s = self.costs.network_ms / 2e3
        while True:
            replica = yield from self._least_busy()
            work_s = self._drawn(self.curve_s[len(batch)], self.costs.variation, self.service)
            if self.cores is not None:
                yield from self._take_core(way_s)
            there = self.env.now + (0.0 if self.cores is not None else way_s)
            ends = max(there, replica.free_at) + work_s
            outage = replica.outage(self.env.now, ends + way_s)
            if outage is None:
                break
            self.n_calls_lost += 1
            self.n_requests_lost += len(batch)
            yield self.env.timeout(max(0.0, outage.down - self.env.now) + self.costs.detection_ms / 1e3)
            self._count(replica, -1)
        replica.free_at = ends
        self.replica_s += work_s
        self.n_calls += 1
        self.n_sent += len(batch)
        yield self.env.timeout(ends - self.env.now)
        if way_s:
            yield from self._take_core(way_s)
        self._count(replica, -1)
        server.n_calls -= 1
        for request in batch:
            self.arrived_s.append(request.arrived)
            self.latency_s.append(self.env.now - request.arrived)
            if self.load.clients:
                self._arrive(server, self.env.now)
        server.tell()

    def _least_busy(self) -> Generator[simpy.Event, Any, Replica]:
        """Return the replica that has the fewest calls, of those whose nodes are up, and count one more for it."""
        while True:
            while self.by_calls:
                n_calls, _, replica = heapq.heappop(self.by_calls)
                if n_calls != replica.n_calls:
                    continue  # the entry no longer holds
                outage = replica.outage(self.env.now, np.nextafter(self.env.now, np.inf))
                if outage is None:
                    self._count(replica, 1)
                    return replica
                self.env.process(self._return(replica, outage.up))
            yield self.env.timeout(CHUNK_S)  # no node is up

    def _return(self, replica: Replica, when: float) -> _Process:
        """Let a replica have calls again when its node is up."""
        if when < math.inf:
            yield self.env.timeout(when - self.env.now)
            self._count(replica, 0)

    def _count(self, replica: Replica, change: int) -> None:
        replica.n_calls += change
        self.n_changes += 1  # among equals, who changed first is first
        heapq.heappush(self.by_calls, (replica.n_calls, self.n_changes, replica))

    @staticmethod
    def _drawn(mean_s: float, variation: float, chance: np.random.Generator) -> float:
        """Draw a time from the gamma distribution of this mean and variation."""
        if not variation or not mean_s:
            return mean_s
        shape = variation**-2
        return float(chance.gamma(shape, mean_s / shape))
