"""The declarative task: what it asks of a request, what it asks of a model, and what it says of itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from feature_extraction_server.core.errors import InvalidInput, ModelError, TooLarge
from feature_extraction_server.core.task import (
    AudioField,
    ConfigField,
    FiniteFloat,
    ImageField,
    Limits,
    Probability,
    StringListField,
    TaskSpec,
    TextField,
    batch_key,
)
from tests.conftest import encode_image


def wav(n_samples: int) -> str:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(n_samples), 16_000, format="WAV")
    return base64.b64encode(file.getvalue()).decode()


def spec(output: Any = str, postprocess: Callable[[Any, dict[str, Any]], Any] | None = None) -> TaskSpec:
    return TaskSpec(
        description="Say something.",
        inputs={
            "first": TextField("The first part"),
            "second": TextField("The second part", required=False),
            "words": StringListField("Some words", required=False),
            "config": ConfigField(),
        },
        output=output,
        postprocess=postprocess,
    )


class Model:
    """A model's function: remembers what it was called with, and answers with ``results`` or with its input."""

    def __init__(self, results: Any = None, limits: Limits | None = None) -> None:
        self.calls: list[dict[str, Any]] = []
        self.results = results
        if limits is not None:
            self.limits = limits

    def __call__(self, **arguments: Any) -> Any:
        self.calls.append(arguments)
        return arguments["first"] if self.results is None else self.results


def run(payload: dict[str, Any], model: Model | None = None, task: TaskSpec | None = None) -> Any:
    return (task or spec()).wrap(model or Model())(**payload)


@pytest.mark.parametrize(
    ("payload", "arguments"),
    [
        pytest.param({"first": "a"}, {"first": ["a"], "config": {}}, id="one value"),
        pytest.param({"first": ["a", "b"]}, {"first": ["a", "b"], "config": {}}, id="a list"),
        pytest.param(
            {"first": ["a", "b"], "second": "c"},
            {"first": ["a", "b"], "second": ["c", "c"], "config": {}},
            id="the second for all",
        ),
        pytest.param(
            {"first": "a", "second": ["b", "c"]},
            {"first": ["a", "a"], "second": ["b", "c"], "config": {}},
            id="the first for all",
        ),
        pytest.param(
            {"first": "a", "words": ["x", "y"], "config": {"n": 1}},
            {"first": ["a"], "words": ["x", "y"], "config": {"n": 1}},
            id="what is no batch, as sent",
        ),
        pytest.param({"first": "a", "second": None, "config": None}, {"first": ["a"], "config": {}}, id="null"),
        pytest.param({"first": ""}, {"first": [""], "config": {}}, id="an empty text"),
    ],
)
def test_model_is_called_once_with_lists(payload: dict[str, Any], arguments: dict[str, Any]) -> None:
    model = Model()

    run(payload, model)

    assert model.calls == [arguments]


def test_model_is_not_called_for_an_empty_list() -> None:
    model = Model()

    assert run({"first": []}, model) == []
    assert model.calls == []


@pytest.mark.parametrize(
    ("payload", "result"),
    [({"first": "a"}, "a"), ({"first": ["a"]}, ["a"]), ({"first": "a", "second": ["b", "c"]}, ["a", "a"])],
    ids=["one value", "a list of one", "a list in another field"],
)
def test_list_gives_a_list(payload: dict[str, Any], result: Any) -> None:
    assert run(payload) == result


@pytest.mark.parametrize(
    ("payload", "field", "message"),
    [
        ({}, "first", "the key 'first' is missing: The first part"),
        ({"first": "a", "third": 1}, "third", "unknown key 'third': this task takes first, second, words, config"),
        ({"first": 1}, "first", "first must be a string, not a number"),
        ({"first": ["a", None]}, "first[1]", "first[1] must be a string, not null"),
        ({"first": "a", "words": []}, "words", "words is empty: it must hold at least one string"),
        ({"first": "a", "words": ["x", 1.5]}, "words[1]", "words[1] must be a string, not a number"),
        ({"first": "a", "config": []}, "config", "config must be an object, not a list"),
        (
            {"first": ["a"], "second": ["b", "c"]},
            "second",
            "lists of one request must be equally long: first has 1, second has 2",
        ),
    ],
    ids=["missing", "unknown", "a number", "null in a list", "empty", "a number in a list", "a list", "lengths"],
)
def test_fault_of_the_client_is_named(payload: dict[str, Any], field: str, message: str) -> None:
    model = Model()

    with pytest.raises(InvalidInput) as caught:
        run(payload, model)

    assert (caught.value.field, caught.value.message) == (field, message)
    assert model.calls == []


@pytest.mark.parametrize("key", ["first", "words"])
def test_limits_of_the_models_function_are_kept(key: str) -> None:
    model = Model(limits=Limits(max_items=2))

    with pytest.raises(TooLarge, match=rf"{key} holds 3 items; at most 2 are allowed \(MAX_ITEMS\)"):
        run({"first": "a"} | {key: ["a", "b", "c"]}, model)


@pytest.mark.parametrize(
    ("output", "result"),
    [
        pytest.param(str, None, id="None"),
        pytest.param(str, 1, id="a number for a text"),
        pytest.param(list[str], "abc", id="a text for a list"),
        pytest.param(list[FiniteFloat], [float("nan")], id="NaN"),
        pytest.param(list[FiniteFloat], np.array([np.inf], np.float32), id="infinity in an array"),
        pytest.param(Probability, 1.01, id="a probability over 1"),
        pytest.param(Probability, float("nan"), id="NaN for a probability"),
    ],
)
def test_result_of_another_type_breaks_the_contract(output: Any, result: Any) -> None:
    with pytest.raises(ModelError, match="the model's result breaks the task's contract"):
        run({"first": "a"}, Model([result]), spec(output))


@pytest.mark.parametrize(
    ("output", "result", "expected"),
    [
        pytest.param(list[FiniteFloat], np.array([0.5, 1], np.float32), [0.5, 1.0], id="an array"),
        pytest.param(list[FiniteFloat], (np.float64(0.5),), [0.5], id="numpy's numbers in a tuple"),
        pytest.param(dict[str, list[int]], {"a": np.arange(2)}, {"a": [0, 1]}, id="an array in a dict"),
        pytest.param(int, np.int64(3), 3, id="numpy's whole number"),
    ],
)
def test_arrays_become_plain_values(output: Any, result: Any, expected: Any) -> None:
    found = run({"first": "a"}, Model([result]), spec(output))

    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("results", [[], ["a", "b"]], ids=["none", "two"])
def test_another_number_of_results_breaks_the_contract(results: list[str]) -> None:
    with pytest.raises(ModelError, match=f"the model gave {len(results)} results for 1 items"):
        run({"first": "a"}, Model(results))


def test_postprocessing_sees_the_items_own_inputs() -> None:
    task = spec(postprocess=lambda result, inputs: f"{result}+{inputs['second']}+{inputs['words']}")

    result = run({"first": ["a", "b"], "second": ["c", "d"], "words": ["w"]}, task=task)

    assert result == ["a+c+['w']", "b+d+['w']"]


def test_value_error_of_postprocessing_is_the_models_fault() -> None:
    def refuse(result: Any, inputs: dict[str, Any]) -> Any:
        raise ValueError("too few")

    with pytest.raises(ModelError, match="too few"):
        run({"first": "a"}, task=spec(postprocess=refuse))


def test_input_schema_describes_every_key() -> None:
    schema = spec().input_schema()

    text = TextField.schema
    assert schema["required"] == ["first"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["first"] == {
        "description": "The first part",
        "anyOf": [text, {"type": "array", "items": text}],
    }
    assert schema["properties"]["words"]["type"] == "array"
    assert set(schema["properties"]) == {"first", "second", "words", "config"}


def test_output_schema_knows_one_result_and_a_list() -> None:
    one = {"type": "array", "items": {"type": "string"}}

    assert spec(list[str]).output_schema() == {"anyOf": [one, {"type": "array", "items": one}]}


def test_output_schema_shows_the_example_of_one_result() -> None:
    task = TaskSpec(description="", inputs={"text": TextField("The text")}, output=int, example=3)

    assert task.output_schema()["anyOf"][0] == {"type": "integer", "examples": [3]}


def test_task_without_a_batch_field_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one batch field"):
        TaskSpec(description="", inputs={"config": ConfigField()}, output=str)


@pytest.mark.parametrize(
    ("max_bytes", "too_much"),
    [
        pytest.param(3000, None, id="room for all"),
        pytest.param(2999, "audio[1]", id="not for the last recording"),
        pytest.param(2199, "audio[0]", id="not for the first recording"),
        pytest.param(1599, "image[1]", id="not for the second picture"),
    ],
)
def test_pictures_and_recordings_of_a_request_have_a_bound_together(max_bytes: int, too_much: str | None) -> None:
    task = TaskSpec(
        description="Look and listen.", inputs={"image": ImageField("A"), "audio": AudioField("B")}, output=int
    )
    picture = encode_image(Image.new("RGB", (20, 10)))  # 800 bytes
    recordings = [wav(150), wav(200)]  # 600 and 800
    limits = Limits(max_decoded_bytes=max_bytes)
    request = {"image": [picture, picture], "audio": recordings}

    if too_much is None:
        assert run(request, Model([1, 2], limits), task) == [1, 2]
        return
    with pytest.raises(TooLarge, match="MAX_DECODED_BYTES") as raised:
        run(request, Model([1, 2], limits), task)
    assert raised.value.field == too_much


def test_image_of_many_items_is_decoded_once(picture: str) -> None:
    task = TaskSpec(description="", inputs={"image": ImageField(""), "first": TextField("")}, output=str)
    model = Model()

    run({"image": picture, "first": ["a", "b"]}, model, task)

    one, other = model.calls[0]["image"]
    assert one is other


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ({"a": 1}, {"a": 1.0}, False),
        ({"a": 1}, {"a": True}, False),
        ({"a": None}, {}, False),
        ({"a": "1"}, {"a": 1}, False),
        ({"a": [1, 2]}, {"a": [2, 1]}, False),
    ],
    ids=["another order", "a fraction", "a boolean", "null", "a text", "another order in a list"],
)
def test_only_equal_arguments_have_equal_keys(one: dict[str, Any], other: dict[str, Any], equal: bool) -> None:
    assert (batch_key(one) == batch_key(other)) is equal
