"""What a server deletes of the applications on a cluster, and what it waits for: never another server's."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from feature_extraction_server.consumers.ray_consumer import cluster as module
from feature_extraction_server.consumers.ray_consumer.cluster import DEPLOYMENT, Cluster

serve = pytest.importorskip("ray.serve", reason="ray[serve] is not installed")

NAME = "fes_model"
OURS, THEIRS = (json.dumps({"setting": value}) for value in ("ours", "theirs"))

Served = dict[str, dict[str, Any]]


def application(configuration: str, made_at: float = 1.0, status: str = "RUNNING") -> dict[str, Any]:
    details = {"replicas": [], "deployment_config": {"user_config": {"configuration": configuration}}}
    return {"last_deployed_time_s": made_at, "status": status, "deployments": {DEPLOYMENT: details}}


def deleting(made_at: float = 1.0) -> dict[str, Any]:
    return {"last_deployed_time_s": made_at, "status": "DELETING", "deployments": {}}


@pytest.fixture
def delete(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """``delete(*states)`` deletes an application of which Ray Serve tells these one after the other.

    It returns the names that Ray Serve was told to delete.
    """

    def run(*states: dict[str, Any] | None) -> list[str]:
        told = list(states)
        deleted: list[str] = []

        def details(self: Cluster) -> Served:
            state = told.pop(0)  # to ask once more is to wait for nothing
            return {} if state is None else {NAME: state}

        monkeypatch.setattr(Cluster, "_details", details)
        monkeypatch.setattr(serve, "delete", lambda name, _blocking: deleted.append(name))
        monkeypatch.setattr(module, "_CHECK_S", 0)
        Cluster(None, lambda: None)._delete(NAME, OURS)  # type: ignore[arg-type]
        assert not told, "it did not wait"
        return deleted

    return run


def test_a_deletion_waits_until_the_application_has_gone(delete: Callable[..., list[str]]) -> None:
    assert delete(application(OURS), deleting(), deleting(), None) == [NAME]


@pytest.mark.parametrize(
    "others", [application(OURS, made_at=2.0), application(OURS, status="DEPLOYING")], ids=["made anew", "used again"]
)
def test_an_application_that_came_in_its_place_is_not_waited_for(
    delete: Callable[..., list[str]], others: dict[str, Any]
) -> None:
    assert delete(application(OURS), deleting(), others) == [NAME]


@pytest.mark.parametrize("there", [application(THEIRS), None], ids=["with other settings", "gone"])
def test_what_is_not_ours_is_not_deleted(delete: Callable[..., list[str]], there: dict[str, Any] | None) -> None:
    assert delete(there) == []
