"""The settings of models on Ray: one line where a value is not allowed, and one model's own before those of all."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from feature_extraction_server.consumers.ray_consumer import settings
from feature_extraction_server.core.engine import Engine

Build = Callable[..., Engine]


def test_what_is_set_for_one_model_comes_before_what_is_set_for_all(build: Build) -> None:
    build(RAY_NUM_GPUS="0.5", RAY_NUM_GPUS_FAKE_ECHO="1", RAY_RESOURCES='{"big": 2}', RAY_MAX_REPLICAS_FAKE_SLOW="3")

    assert settings.demand("fake_echo").of_a_replica() == {"CPU": 1, "GPU": 1, "big": 2}
    assert settings.demand("fake_slow").of_a_replica() == {"CPU": 1, "GPU": 0.5, "big": 2}
    assert (settings.demand("fake_echo").max_replicas, settings.demand("fake_slow").max_replicas) == (1, 3)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"RAY_RESOURCES": "big"}, "RAY_RESOURCES='big' is not allowed: it must be a JSON object"),
        ({"RAY_RESOURCES_FAKE_ECHO": '{"big": "2"}'}, "RAY_RESOURCES_FAKE_ECHO="),
        ({"RAY_RESOURCES": "[1]"}, "it must be a JSON object"),
        ({"RAY_MIN_REPLICAS": "2"}, "RAY_MIN_REPLICAS=2 is not allowed: it must be at most RAY_MAX_REPLICAS"),
        ({"RAY_MAX_REPLICAS": "0"}, "RAY_MAX_REPLICAS='0' is not allowed"),
        ({"RAY_NUM_CPUS_FAKE_ECHO": "-1"}, "RAY_NUM_CPUS_FAKE_ECHO='-1' is not allowed"),
        ({"RAY_ADDRESS": "10.0.0.1"}, "RAY_ADDRESS='10.0.0.1' is not allowed"),
    ],
    ids=["no JSON", "text for a number", "list", "more than the maximum", "none at all", "less than none", "no port"],
)
def test_a_value_that_is_not_allowed_is_told_in_one_line_and_nothing_starts(
    build: Build, capsys: pytest.CaptureFixture[str], given: dict[str, str], told: str
) -> None:
    with pytest.raises(SystemExit) as exit:
        build(**given)

    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1
