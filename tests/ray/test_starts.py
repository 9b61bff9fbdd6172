"""A model that has started and then does not answer: that may pass, and is no failed load."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from feature_extraction_server.consumers.ray_consumer import cluster as module
from feature_extraction_server.consumers.ray_consumer.cluster import Cluster
from feature_extraction_server.core.errors import ModelUnavailable

Find = Callable[..., Any]


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Find:
    """``find(*answers)`` finds a model whose replicas give these answers, or raise them."""

    def run(*answers: Any) -> Any:
        coming = iter(answers)

        def result(timeout_s: float) -> Any:
            answer = next(coming)
            if isinstance(answer, Exception):
                raise answer
            return answer

        handle = SimpleNamespace(provenance=SimpleNamespace(remote=lambda: SimpleNamespace(result=result)))
        monkeypatch.setattr(module, "_handle", lambda name: handle)
        monkeypatch.setattr(module, "_POLL_S", 0)
        monkeypatch.setattr(Cluster, "_wait_for_replica", lambda self, *arguments: {"replicas": []})
        cluster = Cluster(None, lambda: None)  # type: ignore[arg-type]
        return cluster._wait_for_provenance("fes_model", "model", 1, "{}", lambda: True)

    return run


def test_a_replica_that_died_as_soon_as_it_ran_costs_a_start_nothing(find: Find) -> None:
    provenance = {"revision": "1"}

    assert find(RuntimeError("the actor died"), KeyError("fes_model"), provenance) == ({"replicas": []}, provenance)


@pytest.mark.parametrize("raised", [TimeoutError(), RuntimeError("head\nthe actor died")], ids=["silent", "dead"])
def test_a_model_that_never_answers_is_unavailable_for_now(find: Find, raised: Exception) -> None:
    with pytest.raises(ModelUnavailable, match=r"does not answer: (TimeoutError|the actor died)") as caught:
        find(*[raised] * module._MAX_START_TRIES)

    assert caught.value.retry_after is not None
