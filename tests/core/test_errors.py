"""Errors cross processes whole, and each has its own status and code."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from feature_extraction_server.core import errors
from feature_extraction_server.core.errors import ServerError

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, ServerError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_error_survives_pickling(kind: type[ServerError]) -> None:
    error = kind("a sentence", field="image[1]", retry_after=2.5)

    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is kind
    assert (copy.message, copy.field, copy.retry_after) == ("a sentence", "image[1]", 2.5)
    assert str(copy) == "a sentence"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_error_is_listed_with_its_status(kind: type[ServerError]) -> None:
    listed = re.search(rf"\b{kind.__name__} +(\d+)", errors.__doc__ or "")

    assert listed is not None
    assert int(listed[1]) == kind.status


def test_codes_are_unique_snake_case() -> None:
    codes = [kind.code for kind in KINDS]

    assert len(set(codes)) == len(codes)
    assert [code for code in codes if not re.fullmatch("[a-z]+(_[a-z]+)*", code)] == []
