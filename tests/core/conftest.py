"""What several tests of the core share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from feature_extraction_server.core import places


@pytest.fixture
def places_given_back() -> Iterator[None]:
    """Have this process, which lives on after the test, give back the places that it takes there."""
    yield
    while places._locks:
        places._locks.pop().close()
