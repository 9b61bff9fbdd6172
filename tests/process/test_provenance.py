"""Where answers come from, and answers that are kept, in servers of several processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from feature_extraction_server.core.engine import Engine
from feature_extraction_server.core.engine_client import private_directory
from feature_extraction_server.core.errors import ModelUnavailable
from feature_extraction_server.flask.app import create_app
from tests import conftest
from tests.conftest import Server
from tests.process.test_metrics import total
from tests.waiting import at_once, wait_until

pytestmark = pytest.mark.process

Plugin = Callable[[str, str, str], None]

TWO = ("-w", "2", "--worker-class", "gthread", "--threads", "16", "--preload")
TEXTS = "/api/tasks/text_embedding/models/mine/features"
# Its revision is what a file holds when it is loaded.
READS = """
import os
from pathlib import Path
def load_model():
    global revision
    revision = Path({path!r}).read_text()
def provenance():
    return {{"checkpoint": "mine", "revision": revision, "device": "tpu:" + os.environ.get("MODEL_REPLICA", "none")}}
def text_embedding(text, config):
    return [[float(len(one))] for one in text]
"""


@pytest.fixture
def revision(plugin: Plugin, tmp_path: Path) -> Path:
    """The file that says which weights the model ``mine`` loads."""
    path = tmp_path / "revision"
    path.write_text("one")
    plugin("models", "mine", READS.format(path=str(path)))
    return path


def ask(server: Server, text: Any, query: str = "") -> requests.Response:
    response = server.post(TEXTS + query, {"text": text})
    assert response.status_code == 200, response.text
    return response


@pytest.mark.parametrize(("n_replicas", "device"), [("1", "tpu:0"), ("2", "tpu:0, tpu:1")])
@pytest.mark.usefixtures("revision")
def test_origin_of_an_answer_is_told_by_the_processes_that_have_the_model(
    build: Callable[..., Engine], n_replicas: str, device: str
) -> None:
    engine = build(MINE_CONSUMER_TYPE="process_consumer", MODEL_REPLICAS_MINE=n_replicas)
    client = create_app(engine).test_client()

    answer = client.post(TEXTS + "?meta=1", json={"text": "a"}).get_json()

    told = {"checkpoint": "mine", "revision": "one", "dtype": None, "device": device}
    assert answer["result"] == [1.0]
    assert answer["meta"].items() >= told.items()
    assert engine.status("mine")["provenance"] == told


def test_answer_that_one_worker_has_got_is_known_to_the_others(
    revision: Path, tmp_path: Path, gunicorn: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conftest, "PLUGIN_PATH", [*conftest.PLUGIN_PATH, str(tmp_path / "plugins")])
    server = gunicorn(*TWO, RESULT_CACHE_BYTES="100000")

    first = at_once(20, lambda _: ask(server, ["a", "bb"]))
    hits_before = total(server, "fes_result_cache_hits_total", model="mine")
    second = at_once(20, lambda _: ask(server, ["a", "bb"], "?meta=1"))

    assert {answer.text for answer in first} == {"[[1.0],[2.0]]\n"}  # some of them at the same time
    assert {answer.headers["Cache-Status"] for answer in second} == {"fes; hit"}
    assert [answer.json()["result"] for answer in second] == [[[1.0], [2.0]]] * 20
    assert {answer.json()["meta"]["revision"] for answer in second} == {"one"}
    assert len(list((private_directory(server.process.pid) / "metrics").glob("counter_*.db"))) == 2  # both answered
    assert total(server, "fes_result_cache_hits_total", model="mine") == hits_before + 40
    assert total(server, "fes_result_cache_entries", model="mine") == 2


def asked_without_error(engine: Engine) -> bool:
    try:
        engine.run("text_embedding", "mine", {"text": "a"})
    except ModelUnavailable:
        return False
    return True


def test_process_that_is_replaced_must_have_the_weights_of_the_one_before(
    revision: Path, build: Callable[..., Engine]
) -> None:
    engine = build(MINE_CONSUMER_TYPE="process_consumer", MODEL_REPLICAS_MINE="2", RESULT_CHECK_INTERVAL="0.02")
    engine.start("mine", wait=True)
    revision.write_text("two")

    os.kill(engine.status("mine")["pids"][0], 9)

    wait_until(lambda: not asked_without_error(engine), "the process that died")
    wait_until(lambda: engine.status("mine")["state"] == "failed", "the model's end")
    assert "not what the process before had" in engine.status("mine")["error"]
