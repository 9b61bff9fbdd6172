"""What a server takes for the application that it has found or deployed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from feature_extraction_server.consumers.ray_consumer.cluster import DEPLOYMENT, App, _details_of

NAME = "fes_model"
OURS, THEIRS = (json.dumps({"setting": value}) for value in ("ours", "theirs"))


@pytest.fixture
def app() -> App:
    return App(NAME, "model", OURS, handle=None, provenance={})


def details(configuration: str = OURS, state: str = "RUNNING") -> dict[str, Any]:
    replica = {"node_ip": "127.0.0.3", "pid": 1, "state": state}
    return {"replicas": [replica], "deployment_config": {"user_config": {"configuration": configuration}}}


def test_what_has_gone_does_not_come_back_with_another_that_has_its_name(app: App) -> None:
    app.take(details())
    app.take(None)

    app.take(details())

    assert app.gone
    assert app.replicas == []


def test_replicas_are_those_that_were_told_last(app: App) -> None:
    app.take(details(state="STARTING"))

    app.take(details())

    assert not app.gone
    assert [replica["state"] for replica in app.replicas] == ["running"]


@pytest.mark.parametrize(
    ("found", "is_there"),
    [
        ({NAME: {"status": "RUNNING", "deployments": {DEPLOYMENT: details()}}}, True),
        ({NAME: {"status": "RUNNING", "deployments": {DEPLOYMENT: details(THEIRS)}}}, False),
        ({NAME: {"status": "DELETING", "deployments": {DEPLOYMENT: details()}}}, False),
        ({NAME: {"status": "RUNNING", "deployments": {}}}, False),
        ({"fes_other": {"status": "RUNNING", "deployments": {DEPLOYMENT: details()}}}, False),
    ],
    ids=["as it was", "with other settings", "being deleted", "about to be deleted", "another model"],
)
def test_an_application_is_there_as_long_as_it_runs_with_the_same_settings(
    app: App, found: dict[str, Any], is_there: bool
) -> None:
    assert (_details_of(app, found) is not None) == is_there
