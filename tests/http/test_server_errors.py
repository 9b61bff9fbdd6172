"""What a client is told when the server, a model or a plugin is at fault."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from flask.testing import FlaskClient
from PIL import Image
from werkzeug.test import TestResponse

from tests.conftest import encode_image
from tests.http.bad_requests import PNG
from tests.http.conftest import MakeClient, json_of
from tests.media_files import encode, recording
from tests.waiting import wait_until

MakePlugin = Callable[[str, str, str], None]

GATE = """
import threading
entered, opened = threading.Event(), threading.Event()
def load_model(): pass
def image_captioning(image, config):
    entered.set()
    assert opened.wait(60)
    return [["done"]] * len(image)
"""

COUNTS_LOADS = """
loads = []
def load_model():
    loads.append(1)
    if len(loads) == 1:
        raise OSError("the disk is not there yet")
def image_captioning(image, config): return [["done"]] * len(image)
"""


def caption(client: FlaskClient, model: str, image: Any = PNG) -> TestResponse:
    return client.post(f"/api/tasks/image_captioning/models/{model}/features", json={"image": image})


def shown(response: TestResponse) -> tuple[int, str]:
    return response.status_code, json_of(response)["code"]


@pytest.fixture
def gate(plugin: MakePlugin) -> Iterator[Callable[[], ModuleType]]:
    """A model whose function waits until ``gate().opened`` is set; it is set after the test."""
    plugin("models", "gate", GATE)

    def module() -> ModuleType:
        return sys.modules["feature_extraction_server.models.gate"]

    yield module
    if "feature_extraction_server.models.gate" in sys.modules:
        module().opened.set()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


# The model's queue and time


def test_full_queue_is_told_at_once(
    gate: Callable[[], ModuleType], client_with: MakeClient, pool: ThreadPoolExecutor
) -> None:
    client = client_with(MAX_QUEUE_SIZE="1")
    app = client.application
    running = pool.submit(caption, app.test_client(), "gate")
    assert gate().entered.wait(60)
    waiting = pool.submit(caption, app.test_client(), "gate")
    wait_until(lambda: json_of(client.get("/api/models/gate/status"))["queue_depth"] == 1)

    refused = caption(client, "gate")

    gate().opened.set()
    assert shown(refused) == (429, "queue_full")
    assert int(refused.headers["Retry-After"]) >= 1
    assert "MAX_QUEUE_SIZE" in json_of(refused)["error"]
    assert [running.result(60).status_code, waiting.result(60).status_code] == [200, 200]


def test_answer_that_does_not_come_in_time_is_given_up(gate: Callable[[], ModuleType], client_with: MakeClient) -> None:
    client = client_with(REQUEST_TIMEOUT="0.05")

    response = caption(client, "gate")

    gate().opened.set()
    assert shown(response) == (504, "deadline_exceeded")
    assert "REQUEST_TIMEOUT" in json_of(response)["error"]


def test_stopping_a_model_fails_what_it_does_not_finish(
    gate: Callable[[], ModuleType], client_with: MakeClient, pool: ThreadPoolExecutor
) -> None:
    client = client_with(STOP_GRACE_PERIOD="0.05")
    running = pool.submit(caption, client.application.test_client(), "gate")
    assert gate().entered.wait(60)

    client.post("/api/models/gate/stop")

    assert shown(running.result(60)) == (503, "model_unavailable")


# Models that do not load


def test_model_that_cannot_be_loaded_is_told_with_the_reason(client: FlaskClient) -> None:
    response = caption(client, "fake_broken")

    assert shown(response) == (503, "model_load_failed")
    assert "RuntimeError: no weights here" in json_of(response)["error"]
    assert "Traceback" not in json_of(response)["error"]


def test_traceback_of_a_failed_load_is_in_the_log(client: FlaskClient, tmp_path: Path) -> None:
    caption(client, "fake_broken")

    log = (tmp_path / "log.txt").read_text()
    assert "Traceback (most recent call last)" in log
    assert "no weights here" in log


def test_failed_load_is_not_tried_again_at_once(plugin: MakePlugin, client_with: MakeClient) -> None:
    plugin("models", "late", COUNTS_LOADS)
    client = client_with(LOAD_RETRY_DELAY="600")

    answers = [caption(client, "late") for _ in range(3)]

    assert [shown(answer) for answer in answers] == [(503, "model_load_failed")] * 3
    assert len(sys.modules["feature_extraction_server.models.late"].loads) == 1
    assert 0 < int(answers[1].headers["Retry-After"]) <= 600
    assert all("the disk is not there yet" in json_of(answer)["error"] for answer in answers)


def test_failed_load_is_tried_again_after_the_delay(plugin: MakePlugin, client_with: MakeClient) -> None:
    plugin("models", "late", COUNTS_LOADS)
    client = client_with(LOAD_RETRY_DELAY="0")

    answers = [caption(client, "late") for _ in range(2)]

    assert [answer.status_code for answer in answers] == [503, 200]


def test_start_tries_a_failed_load_again_whatever_the_delay(plugin: MakePlugin, client_with: MakeClient) -> None:
    plugin("models", "late", COUNTS_LOADS)
    client = client_with(LOAD_RETRY_DELAY="600")
    caption(client, "late")

    client.post("/api/models/late/start")

    assert caption(client, "late").status_code == 200


# Models that raise


@pytest.mark.parametrize(
    "statement",
    [
        pytest.param("raise ValueError('out of ideas')", id="ValueError"),
        pytest.param("raise MemoryError('out of ideas')", id="MemoryError"),
        pytest.param("raise SystemExit('out of ideas')", id="SystemExit"),
        pytest.param("raise KeyboardInterrupt('out of ideas')", id="KeyboardInterrupt"),
        pytest.param("raise type('Odd', (BaseException,), {})('out of ideas')", id="an exception of its own"),
    ],
)
def test_what_a_model_raises_is_told_without_its_traceback(
    plugin: MakePlugin, client_with: MakeClient, tmp_path: Path, statement: str
) -> None:
    plugin("models", "raises", f"def load_model(): pass\ndef image_captioning(image, config): {statement}\n")
    client = client_with()

    answers = [caption(client, "raises") for _ in range(2)]

    assert [shown(answer) for answer in answers] == [(500, "model_error")] * 2
    assert "out of ideas" in json_of(answers[0])["error"]
    assert "Traceback" not in json_of(answers[0])["error"]
    assert "Traceback (most recent call last)" in (tmp_path / "log.txt").read_text()


def test_half_a_surrogate_pair_in_what_a_model_raises_is_spelt_out(plugin: MakePlugin, client_with: MakeClient) -> None:
    plugin(
        "models", "raises", "def load_model(): pass\ndef image_captioning(image, config): raise OSError('\\ud800')\n"
    )

    assert shown(caption(client_with(), "raises")) == (500, "model_error")


def test_hand_written_task_tells_its_models_error_from_its_own(client: FlaskClient) -> None:
    path = "/api/tasks/fake_shout/models/fake_echo/features"

    good = client.post(path, json={"text": "hello", "mark": "?"})
    own = client.post(path, json={"text": 1})
    models = client.post(path, json={"text": "crash"})

    assert good.json == "HELLO?"
    assert shown(own) == (400, "invalid_input")
    assert shown(models) == (500, "model_error")
    assert "the model's own" in json_of(models)["error"]


def test_fault_of_a_hand_written_task_is_not_shown_to_the_client(
    plugin: MakePlugin, client_with: MakeClient, tmp_path: Path
) -> None:
    plugin("tasks", "odd", "def wrap(func):\n    def run(): raise KeyError('secret')\n    return run\n")
    plugin("models", "even", "def load_model(): pass\ndef odd(): pass\n")

    response = client_with().post("/api/tasks/odd/models/even/features", json={})

    assert shown(response) == (500, "internal_error")
    assert "secret" not in json_of(response)["error"]
    assert "KeyError: 'secret'" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("result", ["float('nan')", "[float('inf')]", "{1, 2}", "object()", "'\\ud800'", "b'bytes'"])
def test_result_that_is_no_json_is_an_error(plugin: MakePlugin, client_with: MakeClient, result: str) -> None:
    plugin("tasks", "odd", f"def wrap(func):\n    def run(): return {result}\n    return run\n")
    plugin("models", "even", "def load_model(): pass\ndef odd(): pass\n")

    response = client_with().post("/api/tasks/odd/models/even/features", json={})

    assert shown(response) == (500, "internal_error")


# Models that break the contract

BOX = "{'boxes': [[0, 0, 1, 1]], 'labels': ['a'], 'scores': [0.5]}"
SOUND = encode(recording([0.0] * 80))


@pytest.mark.parametrize(
    ("task", "result", "word"),
    [
        pytest.param("image_captioning", "[['a'], ['b']]", "2 results for 1 items", id="two results for one item"),
        pytest.param("image_captioning", "[]", "0 results for 1 items", id="no result"),
        pytest.param("image_captioning", "None", "NoneType", id="None"),
        pytest.param("image_captioning", "1", "int", id="a number"),
        pytest.param("image_captioning", "['a']", "contract", id="a caption instead of captions"),
        pytest.param("image_captioning", "[[1]]", "contract", id="a number as caption"),
        pytest.param("image_captioning", "[[None]]", "contract", id="None as caption"),
        pytest.param("image_captioning", "[{'a': 'b'}]", "contract", id="an object as captions"),
        pytest.param("automated_speech_recognition", "[None]", "contract", id="None as transcript"),
        pytest.param("automated_speech_recognition", "[['a']]", "contract", id="a list as transcript"),
        pytest.param("zero_shot_image_classification", "[[float('nan')]]", "contract", id="NaN as probability"),
        pytest.param("zero_shot_image_classification", "[[1.5]]", "contract", id="a probability over 1"),
        pytest.param("zero_shot_image_classification", "[[-0.5]]", "contract", id="a negative probability"),
        pytest.param("zero_shot_image_classification", "[[0.5, 0.5]]", "contract", id="one probability too many"),
        pytest.param("zero_shot_image_classification", "[0.5]", "contract", id="a probability without its list"),
        pytest.param("object_detection", "[{}]", "boxes", id="no boxes"),
        pytest.param("object_detection", f"[{BOX.replace('0.5', '2')}]", "scores", id="a score over 1"),
        pytest.param("object_detection", f"[{BOX.replace('0.5', '')}]", "contract", id="a score missing"),
        pytest.param("object_detection", f"[{BOX.replace('0, 0, 1, 1', '0, 0, 1')}]", "boxes", id="a box of three"),
        pytest.param("object_detection", f"[{BOX.replace('1, 1', '1, 1e999 - 1e999')}]", "boxes", id="NaN in a box"),
        pytest.param("object_detection", BOX, "a dict, not a list", id="an object without its list"),
    ],
)
def test_result_that_breaks_the_tasks_contract_is_an_error(
    plugin: MakePlugin, client_with: MakeClient, task: str, result: str, word: str
) -> None:
    plugin("models", "breaks", f"def load_model(): pass\ndef {task}(**inputs): return {result}\n")
    payload: dict[str, Any] = {"audio": SOUND} if task == "automated_speech_recognition" else {"image": PNG}
    if task == "zero_shot_image_classification":
        payload["classes"] = ["a"]

    response = client_with().post(f"/api/tasks/{task}/models/breaks/features", json=payload)

    assert shown(response) == (500, "model_error")
    assert word in json_of(response)["error"]


def test_arrays_in_a_result_become_lists(plugin: MakePlugin, client_with: MakeClient) -> None:
    source = """
import numpy as np
def load_model(): pass
def zero_shot_image_classification(image, classes, config):
    return np.full((len(image), len(classes)), 0.5, np.float32)
def object_detection(image, config):
    return [{"boxes": np.zeros((1, 4)), "labels": ("a",), "scores": [np.float32(0.25)]} for _ in image]
"""
    plugin("models", "arrays", source)
    client = client_with()

    def result(task: str, **more: Any) -> Any:
        path = f"/api/tasks/{task}/models/arrays/features"
        return json_of(client.post(path, json={"image": PNG} | more))

    assert result("zero_shot_image_classification", classes=["a", "b"]) == [0.5, 0.5]
    assert result("object_detection") == {"boxes": [[0, 0, 0, 0]], "labels": ["a"], "scores": [0.25]}


def test_poisoned_item_of_a_request_fails_the_request_alone(client_with: MakeClient, pool: ThreadPoolExecutor) -> None:
    client = client_with(FAKE_SECONDS="0.05")
    app = client.application
    narrow = encode_image(Image.new("RGB", (1, 5)))

    answers = list(pool.map(lambda image: caption(app.test_client(), "fake_slow", image), [PNG, narrow, PNG, PNG]))

    assert [answer.status_code for answer in answers] == [200, 500, 200, 200]
    assert "one pixel wide" in json_of(answers[1])["error"]


# Plugins that are broken

ADDS_SETTING = "def add_settings(settings): settings.add_setting(name='{}', type=int, default=5, description='')"
BROKEN: dict[str, tuple[str, str, str]] = {
    "a module that is not there": ("models", "import no_such_module", "No module named 'no_such_module'"),
    "a syntax error": ("models", "def load_model(:", "SyntaxError"),
    "an exit at import": ("models", "raise SystemExit(3)", "SystemExit: 3"),
    "no load_model": ("models", "def image_captioning(image, config): pass", "no function load_model"),
    "an unknown consumer type": ("models", "consumer_type = 'cloud'\ndef load_model(): pass", "'cloud' is unknown"),
    "a consumer type that is no name": ("models", "consumer_type = ['a']\ndef load_model(): pass", "['a']"),
    "settings that fail": (
        "models",
        "def load_model(): pass\n"
        "def add_settings(settings):\n    settings.add_setting(name='lower', type=str, default='', description='')",
        "upper case",
    ),
    "a setting that would be the option --help": (
        "models",
        "def load_model(): pass\n" + ADDS_SETTING.format("HELP"),
        "not HELP",
    ),
    "a setting that would be the same option as another": (
        "models",
        "def load_model(): pass\n" + ADDS_SETTING.format("MAX-ITEMS"),
        "letters, digits and _",
    ),
    "a pattern that is none": (
        "models",
        "def load_model(): pass\n"
        + ADDS_SETTING.format("ZZ").replace("type=int, default=5", "type=str, default='', pattern='('"),
        "unterminated subpattern",
    ),
    "a setting of the core's": (
        "apis",
        "def add_routes(application_interface, flask_app): pass\n" + ADDS_SETTING.format("MAX_ITEMS"),
        "MAX_ITEMS is already declared differently",
    ),
    "the core's setting for it": (
        "models",
        "def load_model(): pass\n" + ADDS_SETTING.format("MODEL_REPLICAS_ZZ_BROKEN"),
        "MODEL_REPLICAS_ZZ_BROKEN is already declared differently",
    ),
    "the core's setting for its task": (
        "tasks",
        "def wrap(func): return func\n" + ADDS_SETTING.format("DEFAULT_MODEL_ZZ_BROKEN"),
        "DEFAULT_MODEL_ZZ_BROKEN is already declared differently",
    ),
    "the core's setting for another's model": (
        "apis",
        "def add_routes(application_interface, flask_app): pass\n" + ADDS_SETTING.format("FAKE_ECHO_CONSUMER_TYPE"),
        "FAKE_ECHO_CONSUMER_TYPE is already declared differently",
    ),
    "settings of models that fail": (
        "consumers",
        "def start(model, log_server): pass\ndef add_model_settings(settings, models): raise RuntimeError('no way')",
        "RuntimeError: no way",
    ),
    "no wrap": ("tasks", "task = 1", "no function wrap"),
    "a wrap that is no function": ("tasks", "wrap = 'wrap'", "no function wrap"),
    "no add_routes": ("apis", "", "no function add_routes"),
    "no start": ("consumers", "", "no function start"),
    "routes that fail": (
        "apis",
        "def add_routes(application_interface, flask_app): raise RuntimeError('no way')",
        "RuntimeError: no way",
    ),
    "an exit in add_routes": (
        "apis",
        "def add_routes(application_interface, flask_app): raise SystemExit(1)",
        "SystemExit",
    ),
    "a route that is taken": (
        "apis",
        "def add_routes(application_interface, flask_app):\n"
        "    flask_app.add_url_rule('/api/tasks/list', 'base_api GET /api/tasks/list', lambda: 'mine')",
        "AssertionError",
    ),
}


@pytest.mark.parametrize(("kind", "source", "word"), [pytest.param(*case, id=name) for name, case in BROKEN.items()])
def test_broken_plugin_is_reported_and_left_out(
    plugin: MakePlugin, client_with: MakeClient, tmp_path: Path, kind: str, source: str, word: str
) -> None:
    plugin(kind, "zz_broken", source)

    client = client_with()

    (report,) = [entry for entry in json_of(client.get("/api/plugins")) if entry["name"] == "zz_broken"]
    assert (report["kind"], report["state"]) == (kind, "failed")
    assert word in report["error"]
    assert "zz_broken" in (tmp_path / "log.txt").read_text()
    assert "zz_broken" not in json_of(client.get("/api/models/list")) + json_of(client.get("/api/tasks/list"))
    assert caption(client, "fake_echo").status_code == 200


def test_model_whose_name_gives_it_a_setting_of_the_core_s_is_left_out(
    plugin: MakePlugin, client_with: MakeClient
) -> None:
    plugin("models", "default", "def load_model(): pass\n" + ADDS_SETTING.format("DEFAULT_SIZE"))

    client = client_with(DEFAULT_CONSUMER_TYPE="process_consumer", DEFAULT_SIZE="large")

    error = json_of(client.get("/api/models/default/status"))["error"]
    assert "setting DEFAULT_CONSUMER_TYPE is already declared differently" in error


def test_model_is_left_out_with_its_consumer(plugin: MakePlugin, client_with: MakeClient) -> None:
    plugin("consumers", "zz_consumer", BROKEN["settings of models that fail"][1])
    plugin("models", "zz", "consumer_type = 'zz_consumer'\ndef load_model(): pass")

    response = client_with().get("/api/models/zz/status")

    assert response.status_code == 404
    assert "its consumer_type 'zz_consumer' is unknown" in json_of(response)["error"]


@pytest.mark.parametrize(
    ("kind", "path"), [("models", "/api/models/zz/status"), ("tasks", "/api/tasks/zz/models/list")]
)
def test_request_for_a_broken_plugin_is_told_the_reason(
    plugin: MakePlugin, client_with: MakeClient, kind: str, path: str
) -> None:
    plugin(kind, "zz", "import no_such_module")

    response = client_with().get(path)

    assert response.status_code == 404
    assert "no_such_module" in json_of(response)["error"]


def test_fault_of_an_api_plugin_is_answered_in_json(
    plugin: MakePlugin, client_with: MakeClient, tmp_path: Path
) -> None:
    source = """
def add_routes(application_interface, flask_app):
    flask_app.add_url_rule("/zz", "zz", lambda: 1 / 0)
"""
    plugin("apis", "zz", source)

    response = client_with().get("/zz")

    assert shown(response) == (500, "internal_error")
    assert "ZeroDivisionError" in (tmp_path / "log.txt").read_text()


def test_api_plugin_may_use_all_of_the_application_interface(plugin: MakePlugin, client_with: MakeClient) -> None:
    source = """
def add_routes(application_interface, flask_app):
    def every():
        image = flask_app.config["IMAGE"]
        result = application_interface.run("image_captioning", "fake_echo", {"image": image})
        application_interface.stop("fake_echo")
        application_interface.start("fake_echo")
        status = application_interface.status("fake_echo")
        models = application_interface.models_for("image_captioning")
        return [result, status["model"], models, application_interface.tasks_of("fake_slow"),
            application_interface.list_tasks() != [], application_interface.list_models() != []]
    flask_app.add_url_rule("/zz", "zz", every)
"""
    plugin("apis", "zz", source)
    client = client_with()
    client.application.config["IMAGE"] = PNG

    result, model, models, tasks, has_tasks, has_models = json_of(client.get("/zz"))

    assert (result, model, tasks) == (["40x30 (255, 0, 0)"], "fake_echo", ["image_captioning"])
    assert {"fake_echo", "fake_slow"} <= set(models)
    assert has_tasks
    assert has_models


def test_consumer_plugin_written_on_the_four_names_works(plugin: MakePlugin, client_with: MakeClient) -> None:
    consumer = """
import threading
def start(model, log_server):
    def consume():
        log_server.configure_worker()
        model.load_model()
        for job in model.fetch_jobs():
            job.run()
    thread = threading.Thread(target=consume, name="consumer-of-my-own")
    thread.start()
    return thread
"""
    plugin("consumers", "own_consumer", consumer)
    model = "consumer_type = 'own_consumer'\ndef load_model(): pass\n"
    plugin("models", "own", model + "def image_captioning(image, config): return [['done']] * len(image)\n")
    client = client_with()

    assert caption(client, "own").json == ["done"]
    assert json_of(client.get("/api/models/own/status"))["consumer_type"] == "own_consumer"
    assert any(thread.name == "consumer-of-my-own" for thread in threading.enumerate())
