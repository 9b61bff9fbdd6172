"""Who may ask: API keys, pages of other origins, and how often."""

from __future__ import annotations

from pathlib import Path

import pytest
from flask.testing import FlaskClient

from feature_extraction_server.core.settings import SettingsManager
from feature_extraction_server.core.setup import build_engine
from feature_extraction_server.flask.access import RateLimiter
from tests.http.conftest import MakeClient, json_of

ECHO = "/api/tasks/fake_shout/models/fake_echo/features"
PAGE = "https://page.example"


# API keys


@pytest.fixture
def locked(client_with: MakeClient) -> FlaskClient:
    return client_with(API_KEYS="first-key, second-key")


@pytest.mark.parametrize("given", ["Bearer first-key", "bearer second-key", "Bearer  first-key "])
def test_request_with_one_of_the_keys_is_answered(locked: FlaskClient, given: str) -> None:
    answer = locked.post(ECHO, json={"text": "hi"}, headers={"Authorization": given})

    assert answer.get_json() == "HI!"


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(None, id="none"),
        pytest.param("Bearer", id="no key"),
        pytest.param("Bearer other", id="another key"),
        pytest.param("Bearer first-key, second-key", id="all keys"),
        pytest.param("Bearer first-ke", id="part of a key"),
        pytest.param("Basic first-key", id="another scheme"),
        pytest.param("first-key", id="no scheme"),
        pytest.param("Bearer \u00e9", id="not ASCII"),
    ],
)
@pytest.mark.parametrize("path", ["/api/tasks/list", "/metrics", "/api/tasks", "/nowhere"])
def test_request_without_a_key_is_refused(locked: FlaskClient, path: str, given: str | None) -> None:
    answer = locked.get(path, headers={} if given is None else {"Authorization": given})

    assert answer.status_code == 401
    assert json_of(answer)["code"] == "unauthorized"
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.headers["X-Request-ID"]


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
def test_health_needs_no_key(locked: FlaskClient, path: str) -> None:
    assert locked.get(path).status_code == 200


@pytest.mark.parametrize("path", ["/", "/docs", "/docs/files/start.js", "/openapi.json"])
def test_pages_and_the_description_need_no_key(locked: FlaskClient, path: str) -> None:
    assert locked.get(path, buffered=True).status_code == 200


def test_refusal_below_v1_has_the_shape_of_that_api(locked: FlaskClient) -> None:
    answer = locked.get("/v1/models")

    assert answer.status_code == 401
    assert json_of(answer)["error"]["code"] == "unauthorized"


def test_keys_are_shown_nowhere(client_with: MakeClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = client_with(API_KEYS="very-secret", LOG_LEVEL="DEBUG", ACCESS_LOG="true")
    headers = {"Authorization": "Bearer very-secret"}

    paths = ["/api/tasks/list", "/api/plugins", "/openapi.json", "/api/models/fake_echo", "/metrics", "/nowhere"]
    pages = [client.get(path, headers=headers).text for path in paths]

    shown = capsys.readouterr()
    assert "very-secret" not in "".join([*pages, (tmp_path / "log.txt").read_text(), shown.out, shown.err])


def test_key_that_no_request_could_have_is_told_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = {"LOG_PATH": str(tmp_path / "log.txt"), "API_KEYS": "good, my secret"}

    with pytest.raises(SystemExit) as ended:
        build_engine(SettingsManager(environment, tmp_path / ".env"))

    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert "API_KEYS" in told
    assert "secret" not in told


# Pages of other origins


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", ECHO),
        ("POST", "/api/models/fake_echo/stop"),
        ("POST", "/v1/embeddings"),
        ("DELETE", "/api/jobs/1"),
    ],
)
def test_what_a_foreign_page_sends_is_refused(client: FlaskClient, method: str, path: str) -> None:
    answer = client.open(path, method=method, data="x=1", content_type="text/plain", headers={"Origin": PAGE})

    assert answer.status_code == 403
    assert PAGE in answer.text
    assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize("origin", ["null", "", "://", "http://[::", "localhost", "http://localhost.evil.example"])
def test_what_is_no_origin_of_the_server_is_foreign(client: FlaskClient, origin: str) -> None:
    assert client.post(ECHO, json={"text": "hi"}, headers={"Origin": origin}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"Host": "server.example:8000", "Origin": "http://server.example:8000"}, id="directly"),
        pytest.param({"Host": "Server.Example", "Origin": "https://server.example"}, id="behind TLS"),
        pytest.param(
            {"Host": "backend:5000", "X-Forwarded-Host": "server.example, proxy", "Origin": "https://server.example"},
            id="behind a proxy that tells the host",
        ),
        pytest.param(
            {"Host": "backend:5000", "Sec-Fetch-Site": "same-origin", "Origin": "https://server.example"},
            id="behind a proxy that tells nothing",
        ),
    ],
)
def test_page_of_the_server_itself_may_send(client: FlaskClient, headers: dict[str, str]) -> None:
    assert client.post(ECHO, json={"text": "hi"}, headers=headers).get_json() == "HI!"


def test_page_of_another_port_is_foreign(client: FlaskClient) -> None:
    headers = {"Host": "server.example:8000", "Origin": "http://server.example:3000"}

    assert client.post(ECHO, json={"text": "hi"}, headers=headers).status_code == 403


def test_programs_that_are_no_browsers_may_send(client: FlaskClient) -> None:
    assert client.post(ECHO, json={"text": "hi"}).get_json() == "HI!"


@pytest.mark.parametrize(
    ("setting", "told"),
    [pytest.param(f"{PAGE},http://b.example:3000", PAGE, id="listed"), pytest.param("*", "*", id="any")],
)
def test_page_of_an_allowed_origin_may_use_the_server(client_with: MakeClient, setting: str, told: str) -> None:
    client = client_with(CORS_ORIGINS=setting)

    answer = client.post(ECHO, json={"text": "hi"}, headers={"Origin": PAGE})

    assert answer.get_json() == "HI!"
    assert answer.headers["Access-Control-Allow-Origin"] == told
    assert "X-Request-ID" in answer.headers["Access-Control-Expose-Headers"]
    assert ("Origin" in answer.vary) == (told != "*")


def test_page_of_an_allowed_origin_can_read_errors(client_with: MakeClient) -> None:
    client = client_with(CORS_ORIGINS=PAGE, API_KEYS="key")

    answer = client.post(ECHO, json={"text": "hi"}, headers={"Origin": PAGE})

    assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (401, PAGE)


def test_page_of_an_origin_that_is_not_listed_stays_foreign(client_with: MakeClient) -> None:
    client = client_with(CORS_ORIGINS=PAGE)

    read = client.get("/api/tasks/list", headers={"Origin": "https://other.example"})
    sent = client.post(ECHO, json={"text": "hi"}, headers={"Origin": "https://other.example"})

    assert "Access-Control-Allow-Origin" not in read.headers
    assert "Origin" in read.vary
    assert sent.status_code == 403


def preflight(client: FlaskClient, origin: str) -> tuple[int, dict[str, str]]:
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    answer = client.options(ECHO, headers=asked)
    return answer.status_code, dict(answer.headers)


def test_preflight_of_an_allowed_origin_is_answered_without_a_key(client_with: MakeClient) -> None:
    status, headers = preflight(client_with(CORS_ORIGINS=PAGE, API_KEYS="key"), PAGE)

    assert status == 204
    assert headers["Access-Control-Allow-Origin"] == PAGE
    assert "POST" in headers["Access-Control-Allow-Methods"]
    assert headers["Access-Control-Allow-Headers"] == "authorization,content-type"


def test_preflight_of_another_origin_allows_nothing(client_with: MakeClient) -> None:
    _, headers = preflight(client_with(CORS_ORIGINS=PAGE), "https://other.example")

    assert [name for name in headers if name.startswith("Access-Control-")] == []


@pytest.mark.parametrize("value", ["page.example", "https://page.example/", "https://Page.example", "null", "**"])
def test_what_is_no_origin_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str) -> None:
    environment = {"LOG_PATH": str(tmp_path / "log.txt"), "CORS_ORIGINS": value}

    with pytest.raises(SystemExit):
        build_engine(SettingsManager(environment, tmp_path / ".env"))

    assert f"CORS_ORIGINS={value!r}" in capsys.readouterr().err


# Rates


def test_requests_beyond_the_rate_are_refused_with_when_to_come_back(client_with: MakeClient) -> None:
    client = client_with(RATE_LIMIT="0.001", RATE_LIMIT_BURST="3")

    answers = [client.get("/api/tasks/list") for _ in range(4)]

    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert json_of(answers[-1])["code"] == "rate_limited"
    assert 900 < int(answers[-1].headers["Retry-After"]) <= 1000


def test_each_key_has_a_rate_of_its_own(client_with: MakeClient) -> None:
    client = client_with(RATE_LIMIT="0.001", RATE_LIMIT_BURST="1", API_KEYS="a,b")

    statuses = [
        client.get("/api/tasks/list", headers={"Authorization": f"Bearer {key}"}).status_code for key in ("a", "a", "b")
    ]

    assert statuses == [200, 429, 200]


def test_each_address_has_a_rate_of_its_own_where_there_are_no_keys(client_with: MakeClient) -> None:
    client = client_with(RATE_LIMIT="0.001", RATE_LIMIT_BURST="1")

    statuses = [
        client.get("/api/tasks/list", environ_base={"REMOTE_ADDR": address}).status_code
        for address in ("192.0.2.1", "192.0.2.1", "192.0.2.2")
    ]

    assert statuses == [200, 429, 200]


@pytest.mark.parametrize("path", ["/health/live", "/", "/playground/app.js", "/docs", "/openapi.json"])
def test_health_pages_and_the_description_have_no_rate(client_with: MakeClient, path: str) -> None:
    client = client_with(RATE_LIMIT="0.001", RATE_LIMIT_BURST="1")

    statuses = [client.get(path, buffered=True).status_code for path in (*[path] * 3, "/api/tasks/list")]

    assert statuses == [200] * 4


def test_rate_is_kept_over_time() -> None:
    limiter = RateLimiter(rate=10, burst=2)

    waits = [
        limiter.take("a", now) for now in (1000.0, 1000.0, 1000.0, 1000.1, 1000.15, 1000.2, 1005.0, 1005.0, 1005.0)
    ]

    allowed = [wait == 0 for wait in waits]
    assert allowed == [True, True, False, True, False, True, True, True, False]
    assert waits[2] == pytest.approx(0.1)


def test_limiter_forgets_who_asked_longest_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_extraction_server.flask.access._MAX_BUCKETS", 2)
    limiter = RateLimiter(rate=0.001, burst=1)

    for who in ("a", "b", "c"):
        limiter.take(who, 1000.0)

    assert limiter.take("a", 1000.0) == 0
    assert limiter.take("c", 1000.0) > 0
