"""Request ids, times, logs, health checks and metrics, over an engine in this process."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families
from werkzeug.test import TestResponse

from feature_extraction_server.apis import monitoring_api
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.errors import DeadlineExceeded, ModelUnavailable
from feature_extraction_server.flask.app import create_app
from tests.http.conftest import MakeClient
from tests.waiting import TIMEOUT_S, at_once, wait_until

ECHO = "/api/tasks/fake_shout/models/fake_echo/features"
CAPTIONS = "/api/tasks/image_captioning/models/{}/features"
WAITS = """
import threading
began, may_end = threading.Event(), threading.Event()
def load_model():
    pass
def fake_shout(text):
    began.set()
    may_end.wait(60)
    return text
"""


def samples(client: FlaskClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return the value of each sample of ``/metrics`` by its name and its labels, sorted."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(client: FlaskClient, name: str, **labels: str) -> float | None:
    return samples(client).get((name, tuple(sorted(labels.items()))))


# Request ids


def test_id_that_the_client_gives_comes_back(client: FlaskClient) -> None:
    answer = client.get("/api/tasks/list", headers={"X-Request-ID": "a-b/c.1"})

    assert answer.headers.getlist("X-Request-ID") == ["a-b/c.1"]


@pytest.mark.parametrize(
    "given",
    [
        pytest.param("", id="empty"),
        pytest.param("x" * 129, id="too long"),
        pytest.param("a b", id="space"),
        pytest.param("a\u00e9", id="not ASCII"),
        pytest.param("a\tb", id="control character"),
        pytest.param(None, id="none"),
    ],
)
def test_id_is_made_where_there_is_no_good_one(client: FlaskClient, given: str | None) -> None:
    answer = client.get("/api/tasks/list", headers={} if given is None else {"X-Request-ID": given})

    assert re.fullmatch("[0-9a-f]{24}", answer.headers["X-Request-ID"])


def test_every_answer_has_an_id_of_its_own_errors_included(client: FlaskClient) -> None:
    ids = {client.get(path).headers["X-Request-ID"] for path in ("/nowhere", "/nowhere", "/api/models/nobody/status")}

    assert len(ids) == 3


def test_traceback_of_a_model_s_error_is_logged_with_the_request_s_id(
    client: FlaskClient, tmp_path: Path, picture: str
) -> None:
    answer = client.post(ECHO, json={"text": "crash"}, headers={"X-Request-ID": "who-crashed"})

    assert answer.status_code == 500
    line = next(line for line in (tmp_path / "log.txt").read_text().splitlines() if "failed on the task" in line)
    assert "[who-crashed]" in line


def test_lines_between_requests_have_no_id(client: FlaskClient, tmp_path: Path) -> None:
    client.post(ECHO, json={"text": "hi"}, headers={"X-Request-ID": "who-asked"})
    client.post("/api/models/fake_echo/stop", headers={"X-Request-ID": "who-stopped"})
    wait_until(lambda: "fake_echo is stopped" in (tmp_path / "log.txt").read_text())

    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert "[who-stopped]" in next(line for line in lines if "is stopping" in line)
    assert "[who" not in next(line for line in lines if "is stopped" in line)


# Times


def times(answer: TestResponse) -> dict[str, float]:
    parts = re.fullmatch(r"queue;dur=(\d+\.\d+), compute;dur=(\d+\.\d+)", answer.headers["Server-Timing"])
    assert parts
    return {"queue": float(parts[1]), "compute": float(parts[2])}


def test_answer_tells_how_long_it_was_queued_and_computed(client_with: MakeClient, picture: str) -> None:
    client = client_with(FAKE_SECONDS="0.1", FAKE_LOAD_SECONDS="0.2")

    told = times(client.post(CAPTIONS.format("fake_slow"), json={"image": picture}))

    assert told["queue"] >= 200
    assert told["compute"] >= 100


def test_error_of_a_model_tells_its_times(client: FlaskClient) -> None:
    answer = client.post(ECHO, json={"text": "crash"})

    assert answer.status_code == 500
    assert times(answer)


def test_answer_for_which_no_model_ran_tells_no_times(client: FlaskClient) -> None:
    assert "Server-Timing" not in client.get("/api/tasks/list").headers
    assert "Server-Timing" not in client.post(ECHO, json={"text": 7}).headers


# Logs


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_log_is_one_json_object_a_line(client_with: MakeClient, tmp_path: Path) -> None:
    client = client_with(LOG_FORMAT="json")

    client.post(ECHO, json={"text": "crash"}, headers={"X-Request-ID": "who"})

    failed = [told for told in records(tmp_path / "log.txt") if told["level"] == "ERROR"]
    assert [(told["request_id"], told["logger"]) for told in failed] == [("who", "feature_extraction_server.core.jobs")]
    assert "ValueError: the model's own" in failed[0]["exception"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", failed[0]["time"])


def test_access_is_logged_with_what_ran(client_with: MakeClient, tmp_path: Path, picture: str) -> None:
    client = client_with(LOG_FORMAT="json", ACCESS_LOG="true")

    client.post(CAPTIONS.format("fake_echo") + "?secret=1", json={"image": [picture] * 3})

    (told,) = [told for told in records(tmp_path / "log.txt") if told["logger"].endswith(".access")]
    expected = {"method": "POST", "path": CAPTIONS.format("fake_echo"), "status": 200, "items": 3, "batch_items": 3}
    assert told.items() >= expected.items()
    assert told.items() >= {"task": "image_captioning", "model": "fake_echo"}.items()
    assert 0 <= told["computed_seconds"] <= told["seconds"]
    assert told["queued_seconds"] <= told["seconds"]
    assert "secret" not in (tmp_path / "log.txt").read_text()


def test_path_in_the_access_log_can_forge_no_line(client_with: MakeClient, tmp_path: Path) -> None:
    client = client_with(ACCESS_LOG="true")

    client.get("/a%0Ab%20c%C3%A9")

    (line,) = [line for line in (tmp_path / "log.txt").read_text().splitlines() if ".access: " in line]
    assert re.search(r": \[[0-9a-f]{24}\] GET /a%0Ab%20c%C3%A9 404 seconds=", line)


def test_access_is_not_logged_by_default(client: FlaskClient, tmp_path: Path) -> None:
    client.get("/api/tasks/list")

    assert ".access" not in (tmp_path / "log.txt").read_text()


# Health


@pytest.fixture
def stuck(plugin: Callable[[str, str, str], None]) -> Iterator[None]:
    plugin("models", "zz_waits", WAITS)
    yield
    import feature_extraction_server.models.zz_waits as model  # type: ignore[import-not-found]

    model.may_end.set()


def test_server_without_models_to_preload_is_ready(client: FlaskClient) -> None:
    assert client.get("/health/live").json == {"status": "live"}
    assert client.get("/health/ready").json == {"status": "ready"}


def test_server_is_ready_once_all_models_to_preload_run(build: Callable[..., Engine]) -> None:
    engine = build(PRELOAD_MODELS="fake_echo,fake_slow")
    client = create_app(engine).test_client()
    engine.start("fake_echo", wait=True)

    before = client.get("/health/ready")
    engine.start("fake_slow", wait=True)
    after = client.get("/health/ready")

    assert before.status_code == 503
    assert before.json == {"status": "not ready", "reason": "the model fake_slow is stopped"}
    assert after.status_code == 200


def test_server_stays_ready_when_a_model_to_preload_is_stopped_but_not_when_it_fails(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(PRELOAD_MODELS="fake_echo")
    client = create_app(engine).test_client()
    engine.start("fake_echo", wait=True)

    engine.stop("fake_echo", wait=True)
    stopped = client.get("/health/ready")
    monkeypatch.setattr("feature_extraction_server.models.fake_echo.load_model", lambda: 1 / 0)
    with pytest.raises(ModelUnavailable):
        engine.start("fake_echo", wait=True)
    failed = client.get("/health/ready")
    may_load = threading.Event()
    monkeypatch.setattr("feature_extraction_server.models.fake_echo.load_model", lambda: may_load.wait(TIMEOUT_S))
    engine.start("fake_echo")
    wait_until(lambda: engine.status("fake_echo")["state"] == "loading")
    loading_again = client.get("/health/ready")
    may_load.set()
    engine.start("fake_echo", wait=True)
    loaded_again = client.get("/health/ready")
    engine.stop("fake_echo", wait=True)
    monkeypatch.setattr("feature_extraction_server.models.fake_echo.load_model", lambda: 1 / 0)
    with pytest.raises(ModelUnavailable):
        engine.start("fake_echo", wait=True)
    engine.stop("fake_echo")
    stopped_after_a_failure = client.get("/health/ready")

    answers = (stopped, failed, loading_again, loaded_again, stopped_after_a_failure)
    assert [answer.status_code for answer in answers] == [200, 503, 503, 200, 200]
    assert "division by zero" in failed.get_json()["reason"]


def test_reason_is_told_where_a_model_failed_to_load(build: Callable[..., Engine]) -> None:
    engine = build(PRELOAD_MODELS="fake_broken")
    client = create_app(engine).test_client()
    with pytest.raises(ModelUnavailable):
        engine.start("fake_broken", wait=True)

    answer = client.get("/health/ready")

    assert answer.status_code == 503
    assert "no weights here" in answer.get_json()["reason"]


@pytest.mark.usefixtures("stuck")
def test_server_whose_model_hangs_is_live_and_ready(build: Callable[..., Engine]) -> None:
    engine = build(PRELOAD_MODELS="zz_waits")
    client = create_app(engine).test_client()
    engine.start("zz_waits", wait=True)
    request = threading.Thread(
        target=lambda: create_app(engine).test_client().post(ECHO.replace("fake_echo", "zz_waits"), json={"text": "a"})
    )
    request.start()
    wait_until(lambda: engine.status("zz_waits")["running_jobs"] == 1)

    answers = [client.get(path).status_code for path in ("/health/live", "/health/ready")]
    running = value(client, "fes_running_requests", model="zz_waits")
    import feature_extraction_server.models.zz_waits as model

    model.may_end.set()
    request.join(TIMEOUT_S)

    assert answers == [200, 200]
    assert running == 1


def test_engine_that_is_late_counts_as_it_was(build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(PRELOAD_MODELS="fake_echo")
    client = create_app(engine).test_client()
    engine.start("fake_echo", wait=True)

    def late(timeout_s: float) -> list[dict[str, Any]]:
        raise DeadlineExceeded("the engine does not answer")

    before = client.get("/health/ready").status_code
    monkeypatch.setattr(engine, "overview", late)
    shortly_after = client.get("/health/ready").status_code
    monkeypatch.setattr("feature_extraction_server.apis.monitoring_api.REMEMBERED_S", -1)
    long_after = client.get("/health/ready")

    assert (before, shortly_after, long_after.status_code) == (200, 200, 503)
    assert long_after.get_json()["reason"] == "the engine does not answer"


# Metrics


def test_requests_are_counted_by_route_task_model_and_status(client: FlaskClient) -> None:
    for _ in range(3):
        client.post(ECHO, json={"text": "hi"})
    client.post(ECHO, json={"text": "crash"})

    labels = {"method": "POST", "task": "fake_shout", "model": "fake_echo"}
    route = "/api/tasks/<task>/models/<model>/features"
    assert value(client, "fes_requests_total", route=route, status="200", **labels) == 3
    assert value(client, "fes_requests_total", route=route, status="500", **labels) == 1


def test_names_that_clients_make_up_become_no_labels(client: FlaskClient) -> None:
    client.get("/made/up")
    client.open("/made/up", method="MADEUP")
    client.get("/api/models/made_up/status")
    client.post("/api/tasks/made_up/features", json={})

    assert "made" not in client.get("/metrics").text.lower()


def test_models_are_measured(client: FlaskClient, picture: str) -> None:
    client.post(CAPTIONS.format("fake_echo"), json={"image": [picture] * 40})

    by_task = {"model": "fake_echo", "task": "image_captioning"}
    assert value(client, "fes_batch_items_sum", **by_task) == 40
    assert value(client, "fes_batch_items_count", **by_task) == 2
    assert value(client, "fes_batch_items_bucket", le="8.0", **by_task) == 1
    assert value(client, "fes_inference_seconds_count", **by_task) == 2
    assert value(client, "fes_queue_seconds_count", **by_task) == 1
    assert value(client, "fes_model_items_total", model="fake_echo") == 40
    assert value(client, "fes_model_loads_total", model="fake_echo") == 1
    assert value(client, "fes_model_state", model="fake_echo", state="running") == 1
    assert value(client, "fes_model_state", model="fake_slow", state="stopped") == 1
    assert value(client, "fes_queue_depth", model="fake_slow") == 0
    assert (value(client, "fes_model_memory_bytes", model="fake_echo") or 0) > 1e6
    assert value(client, "fes_engine_up") == 1


def test_metrics_do_without_an_engine_that_is_late(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    client = create_app(engine).test_client()

    def late(timeout_s: float) -> list[dict[str, Any]]:
        raise DeadlineExceeded("the engine does not answer")

    monkeypatch.setattr(engine, "overview", late)

    assert value(client, "fes_engine_up") == 0
    assert value(client, "fes_requests_total", method="GET", route="/metrics", task="", model="", status="200") == 1


def test_threads_that_count_at_once_make_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    write_bytes = Path.write_bytes

    def write_slowly(path: Path, data: bytes) -> int:
        written.append(path)
        time.sleep(0.05)
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_slowly)
    place = monitoring_api._Place(tmp_path)

    at_once(4, lambda _: place.make_room())

    assert len(written) == 1
    (file,) = tmp_path.glob("*.db")
    assert file.stat().st_size == monitoring_api.COUNTS_BYTES
