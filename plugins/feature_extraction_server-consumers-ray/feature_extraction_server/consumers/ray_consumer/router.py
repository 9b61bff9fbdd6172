"""Which replica of a model gets a call: the one that has the fewest."""

from __future__ import annotations

import random

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica


class LeastBusyRouter(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Offers all replicas to Ray Serve, which takes the one with the shortest queue.

    Ray Serve's own choice is between two at random: with as many calls under way as there are replicas, half of the
    calls would wait behind another while some replica has nothing to do.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        return [random.sample(candidate_replicas, len(candidate_replicas))]
