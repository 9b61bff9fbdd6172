"""How often requests that wait look whether they are still wanted."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from feature_extraction_server.core.patience import LOOKS_PER_S, counted, look_interval_s


@pytest.mark.parametrize("n", [0, 1, LOOKS_PER_S // 10])
def test_few_that_wait_look_as_often_as_they_are_told(n: int) -> None:
    with ExitStack() as requests:
        for _ in range(n):
            requests.enter_context(counted())
        assert look_interval_s(0.1) == 0.1


@pytest.mark.parametrize("shortest_s", [0.01, 0.1, 1.0])
def test_many_that_wait_look_no_more_often_together_than_a_few(shortest_s: float) -> None:
    with ExitStack() as requests:
        for n in range(1, 3000):
            requests.enter_context(counted())
            interval_s = look_interval_s(shortest_s)
            assert interval_s == shortest_s or LOOKS_PER_S <= n / interval_s < 2 * LOOKS_PER_S

    assert look_interval_s(shortest_s) == shortest_s
