"""Models at work at the same time share the cores."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from feature_extraction_server.core import torch_threads

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch_threads, "N_CORES", 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_model_alone_has_all_cores() -> None:
    with torch_threads.at_work():
        assert torch.get_num_threads() == 8


def test_the_second_of_two_models_at_work_has_half_of_them() -> None:
    with torch_threads.at_work(), torch_threads.at_work():
        assert torch.get_num_threads() == 4


def test_the_first_one_has_its_half_from_its_next_batch_on() -> None:
    second_works, first_has_looked = threading.Event(), threading.Event()

    def second() -> None:
        with torch_threads.at_work():
            second_works.set()
            first_has_looked.wait(20)

    thread = threading.Thread(target=second)
    thread.start()
    second_works.wait(20)
    with torch_threads.at_work():
        n_threads = torch.get_num_threads()
    first_has_looked.set()
    thread.join(20)

    assert n_threads == 4
    with torch_threads.at_work():
        assert torch.get_num_threads() == 8


def test_more_models_than_cores_have_a_thread_each() -> None:
    with torch_threads.at_work():
        assert torch_threads.share() == 8
    torch_threads._n_at_work = 20
    try:
        assert torch_threads.share() == 1
    finally:
        torch_threads._n_at_work = 0


@pytest.mark.parametrize(("given", "expected"), [("4", 4), ("", 8), ("0", 8), ("many", 8)])
def test_the_number_given_in_the_environment_is_shared(
    monkeypatch: pytest.MonkeyPatch, given: str, expected: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)

    assert torch_threads.share() == expected
