"""Where requests go is found once for each address, and remembered."""

from __future__ import annotations

import pytest
from flask import request
from flask.testing import FlaskClient

from feature_extraction_server.flask.addresses import MAX_ADDRESSES

ECHO = "/api/tasks/fake_shout/models/fake_echo/features"


def test_requests_to_one_address_have_their_own_answers(client: FlaskClient) -> None:
    answers = [client.post(ECHO, json={"text": text}).json for text in ("a", "b", "c")]

    assert answers == ["A!", "B!", "C!"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", ECHO, 200),
        ("GET", ECHO, 405),
        ("GET", "/api/models/fake_echo/tasks/list", 200),
        ("GET", "/api/models/nothing/status", 404),
        ("GET", "/nothing", 404),
        ("GET", "/api/tasks/list", 200),
        ("POST", "/api/tasks/list", 405),
    ],
)
def test_an_address_leads_to_the_same_place_each_time(client: FlaskClient, method: str, path: str, status: int) -> None:
    answers = [client.open(path, method=method, json={"text": "hi"}) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [status] * 3
    assert len({answer.get_data() for answer in answers}) == 1


def test_what_a_route_does_to_its_arguments_is_not_remembered(client: FlaskClient) -> None:
    def forget(**arguments: str) -> dict[str, str]:
        taken = dict(arguments)
        view_args = request.view_args
        assert view_args is not None
        view_args.clear()
        return taken

    client.application.add_url_rule("/taken/<name>", "taken", forget)

    assert [client.get("/taken/it").json for _ in range(3)] == [{"name": "it"}] * 3


def test_hosts_and_prefixes_are_told_apart(client: FlaskClient) -> None:
    app = client.application
    app.add_url_rule("/where", "where", lambda: request.base_url)

    seen = [
        client.get("/where", base_url=base).get_data(as_text=True)
        for base in ("http://a.example", "http://b.example:81", "https://a.example", "http://a.example/below")
        for _ in range(2)
    ]

    assert seen == [
        *["http://a.example/where"] * 2,
        *["http://b.example:81/where"] * 2,
        *["https://a.example/where"] * 2,
        *["http://a.example/below/where"] * 2,
    ]


def test_few_addresses_are_remembered_whatever_clients_ask_for(client: FlaskClient) -> None:
    for n in range(MAX_ADDRESSES + 10):
        assert client.get(f"/nothing/{n}").status_code == 404

    assert 0 < len(client.application.addresses) <= MAX_ADDRESSES  # type: ignore[attr-defined]
    assert client.post(ECHO, json={"text": "a"}).json == "A!"
