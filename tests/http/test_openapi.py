"""The OpenAPI document is valid and complete, its examples are true, and Swagger UI shows it without another host."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from feature_extraction_server.core import errors
from feature_extraction_server.core.engine import Engine
from feature_extraction_server.flask.app import create_app
from tests.http.conftest import json_of

Document = dict[str, Any]

MINE = """
from feature_extraction_server.flask.openapi import json_response, operation
def add_routes(application_interface, flask_app):
    flask_app.add_url_rule("/mine", "mine", lambda: "1")
def describe_routes(application_interface):
    answer = json_response("One", {"type": "integer"}, 1)
    return {"/mine": {"get": operation("Mine", tag="mine", operation_id="mine", answer=answer)}}
"""


@pytest.fixture
def app(engine: Engine) -> Flask:
    return create_app(engine)


@pytest.fixture
def document(app: Flask) -> Document:
    return document_of(app)


def document_of(app: Flask) -> Document:
    answer: Document = json_of(app.test_client().get("/openapi.json"))
    return answer


def operations(document: Document) -> Iterator[tuple[str, str, Document]]:
    for path, item in document["paths"].items():
        for method in item.keys() & {"get", "put", "post", "delete", "patch"}:
            yield path, method.upper(), item[method]


def test_document_is_valid(document: Document) -> None:
    assert document["openapi"] == "3.1.0"
    validate(document)


def test_every_route_is_described_and_every_description_is_a_route(app: Flask, document: Document) -> None:
    routes = {
        (rule.rule, method)
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    adapter = app.url_map.bind("localhost")

    described = {
        (adapter.match(re.sub(r"\{\w+\}", "x", path), method, return_rule=True)[0].rule, method)
        for path, method, _ in operations(document)
    }

    assert described == routes


def test_every_operation_has_an_id_of_its_own_a_summary_and_a_tag_that_is_explained(document: Document) -> None:
    found = [operation for _, _, operation in operations(document)]
    ids = [operation["operationId"] for operation in found]
    explained = {tag["name"] for tag in document["tags"] if tag["description"]}

    assert len(set(ids)) == len(ids)
    assert all(operation["summary"] for operation in found)
    assert {tag for operation in found for tag in operation["tags"]} <= explained


def test_every_error_of_the_server_is_described_with_its_code(document: Document) -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ServerError)]
    unseen = {errors.ClientDisconnected}  # nobody is there to see it

    for kind in set(kinds) - unseen:
        assert f"`{kind.code}`" in document["components"]["responses"][str(kind.status)]["description"]


@pytest.mark.parametrize("task", ["image_captioning", "automated_speech_recognition", "zero_shot_image_classification"])
def test_example_of_a_task_is_answered(app: Flask, document: Document, task: str) -> None:
    operation = document["paths"][f"/api/tasks/{task}/models/{{model}}/features"]["post"]
    example = operation["requestBody"]["content"]["application/json"]["example"]

    response = app.test_client().post(f"/api/tasks/{task}/models/fake_echo/features", json=example)

    assert response.status_code == 200


def test_every_example_fits_its_schema(document: Document) -> None:
    contents = [
        content
        for _, _, operation in operations(document)
        for part in (operation.get("requestBody", {}), *operation["responses"].values())
        for kind, content in part.get("content", {}).items()
        if "example" in content and kind == "application/json"
    ]
    contents += [part["content"]["application/json"] for part in document["components"]["responses"].values()]

    wrong = [c for c in contents if not Draft202012Validator(document | c["schema"]).is_valid(c["example"])]

    assert contents
    assert wrong == []


@pytest.mark.parametrize("path", ["/api/models/{model}", "/api/models/{model}/status"])
def test_every_key_of_a_models_answer_is_described(app: Flask, document: Document, path: str) -> None:
    content = document["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]

    answer = json_of(app.test_client().get(path.format(model="fake_echo")))

    assert answer.keys() == content["schema"]["properties"].keys() == content["example"].keys()


def test_hand_written_task_is_described_as_far_as_its_signature_tells(document: Document) -> None:
    schemas = document["components"]["schemas"]

    assert schemas["fake_shout.input"] == {
        "type": "object",
        "properties": {"text": {"type": "string"}, "mark": {"type": "string"}},
        "required": ["text"],
        "additionalProperties": False,
    }
    assert schemas["fake_shout.output"] == {"type": "string"}


def test_task_whose_signature_cannot_be_read_is_described_all_the_same(
    plugin: Callable[..., None], build: Callable[..., Engine]
) -> None:
    plugin("tasks", "odd", "def wrap(func):\n    return func.there_is_no_such_attribute")

    document = document_of(create_app(build()))

    assert document["components"]["schemas"]["odd.input"]["additionalProperties"] is True


def test_types_within_a_result_are_components(document: Document, plugin: Callable[..., None], build: Any) -> None:
    plugin(
        "tasks",
        "nested",
        "from typing_extensions import TypedDict\n"
        "from feature_extraction_server.core.task import TaskSpec, TextField\n"
        "class Word(TypedDict):\n    text: str\n"
        "wrap = TaskSpec(description='Words.', inputs={'text': TextField('A text')}, output=list[Word]).wrap\n",
    )

    document = document_of(create_app(build()))

    validate(document)
    schemas = document["components"]["schemas"]
    assert schemas["nested.output"]["anyOf"][0]["items"] == {"$ref": "#/components/schemas/nested.Word"}
    assert schemas["nested.Word"]["properties"] == {"text": {"title": "Text", "type": "string"}}


def test_keys_and_rates_are_described_where_they_are_set(build: Callable[..., Engine]) -> None:
    app = create_app(build(API_KEYS="s3same", RATE_LIMIT="1000"))
    answer = app.test_client().get("/openapi.json", headers={"Authorization": "Bearer s3same"})
    document: Document = json.loads(answer.data)

    validate(document)
    assert document["security"] == [{"api_key": []}]
    assert {"401", "429"} <= document["paths"]["/api/tasks/list"]["get"]["responses"].keys()


def test_routes_that_need_no_key_are_described_as_such(build: Callable[..., Engine]) -> None:
    app = create_app(build(API_KEYS="s3same"))
    document = document_of(app)

    refused, told, open_to_all = set(), set(), set()
    for path, method, operation in operations(document):
        with app.test_client().open(re.sub(r"\{\w+\}", "x", path), method=method) as answer:
            refused |= {(path, method)} if answer.status_code == 401 else set()
        told |= {(path, method)} if "401" in operation["responses"] else set()
        open_to_all |= {(path, method)} if operation.get("security") == [] else set()

    validate(document)
    assert told == refused
    assert open_to_all == {(path, method) for path, method, _ in operations(document)} - refused
    assert {("/health/live", "GET"), ("/docs/files/{name}", "GET"), ("/", "GET")} <= open_to_all


def test_routes_without_a_rate_are_described_as_such(build: Callable[..., Engine]) -> None:
    app = create_app(build(RATE_LIMIT="0.001", RATE_LIMIT_BURST="1"))
    document = document_of(app)
    app.test_client().get("/api/tasks/list")  # the only one that may be asked for now

    refused, told = set(), set()
    for path, method, operation in operations(document):
        with app.test_client().open(re.sub(r"\{\w+\}", "x", path), method=method) as answer:
            refused |= {(path, method)} if answer.status_code == 429 else set()
        told |= {(path, method)} if "429" in operation["responses"] else set()

    assert told == refused
    assert refused.isdisjoint({("/health/live", "GET"), ("/docs/files/{name}", "GET"), ("/", "GET")})
    assert all("security" not in operation for _, _, operation in operations(document))


def test_api_plugin_adds_its_routes_to_the_document(plugin: Callable[..., None], build: Callable[..., Engine]) -> None:
    plugin("apis", "mine", MINE)

    document = document_of(create_app(build()))

    assert document["paths"]["/mine"]["get"]["operationId"] == "mine"


@pytest.mark.parametrize(
    "describe",
    [
        pytest.param("", id="has no description"),
        pytest.param("def describe_routes(application_interface): raise RuntimeError", id="fails to describe itself"),
    ],
)
def test_api_plugin_that_is_not_described_leaves_the_others_described(
    plugin: Callable[..., None], build: Callable[..., Engine], describe: str
) -> None:
    plugin("apis", "mine", f"def add_routes(application_interface, flask_app): pass\n{describe}")

    assert "/api/tasks/list" in document_of(create_app(build()))["paths"]


# Swagger UI


@pytest.mark.parametrize(("path", "base"), [("/docs", "./"), ("/docs/", "../")])
def test_page_finds_its_files_and_the_document_from_where_it_is(client: FlaskClient, path: str, base: str) -> None:
    page = client.get(path)

    assert page.mimetype == "text/html"
    assert f'<base href="{base}">' in page.text
    for name in re.findall(r'(?:src|href)="(docs/[^"]+)"', page.text):
        with client.get(f"/{name}") as file:
            assert file.status_code == 200


def test_page_names_no_other_host_and_forbids_the_browser_to_ask_one(client: FlaskClient) -> None:
    page = client.get("/docs")
    policy = page.headers["Content-Security-Policy"]

    assert "//" not in page.text
    assert "//" not in client.get("/docs/files/start.js").text
    assert "default-src 'none'" in policy
    assert set(re.findall(r"(?:script|connect)-src ([^;]+)", policy)) == {"'self'"}


def test_swagger_ui_is_one_that_knows_this_version_of_openapi() -> None:
    assert int(metadata.version("flask-swagger-ui").partition(".")[0]) >= 5


@pytest.mark.parametrize("name", ["nothing.js", "..%2f__init__.py", "%2e%2e"])
def test_no_other_file_is_given_out(client: FlaskClient, name: str) -> None:
    assert client.get(f"/docs/files/{name}").status_code == 404
