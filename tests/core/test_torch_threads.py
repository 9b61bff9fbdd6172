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
    monkeypatch.setattr(torch_threads, "_taken", None)
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


def test_the_share_that_another_process_has_told_is_what_parts_are_made_for() -> None:
    torch_threads.take_share(2)

    assert torch.get_num_threads() == 2
    assert len(torch_threads.split(range(8))) == 2
    torch_threads.take_share(4)
    assert len(torch_threads.split(range(8))) == 4


def test_parts_are_computed_at_once_by_a_thread_each_with_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_threads, "N_CORES", 3)
    all_at_work = threading.Barrier(3)

    def compute(part: int) -> tuple[int, int]:
        all_at_work.wait(20)
        return part, torch.get_num_threads()

    with torch_threads.at_work():
        results = torch_threads.in_parallel(compute, [0, 1, 2])
        n_threads_afterwards = torch.get_num_threads()

    assert results == [(0, 1), (1, 1), (2, 1)]
    assert n_threads_afterwards == 3


def test_no_more_parts_are_computed_at_once_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_threads, "N_CORES", 4)

    three_at_once = threading.Barrier(3)

    with torch_threads.at_work(), pytest.raises(threading.BrokenBarrierError):
        torch_threads.in_parallel(lambda _: three_at_once.wait(0.1), range(3), most_at_once=2)


@pytest.mark.parametrize(("n_cores", "n_parts"), [(1, 3), (4, 1)], ids=["one core", "one part"])
def test_what_cannot_be_shared_is_computed_by_the_caller_with_all_its_cores(
    monkeypatch: pytest.MonkeyPatch, n_cores: int, n_parts: int
) -> None:
    monkeypatch.setattr(torch_threads, "N_CORES", n_cores)

    with torch_threads.at_work():
        results = torch_threads.in_parallel(lambda _: (threading.get_ident(), torch.get_num_threads()), [0] * n_parts)

    assert results == [(threading.get_ident(), n_cores)] * n_parts


def test_more_parts_than_cores_come_back_in_order() -> None:
    with torch_threads.at_work():
        assert torch_threads.in_parallel(str, range(100)) == [str(part) for part in range(100)]


def test_error_of_one_part_is_raised() -> None:
    def fail(part: int) -> None:
        if part == 5:
            raise ValueError("part 5")

    with torch_threads.at_work(), pytest.raises(ValueError, match="part 5"):
        torch_threads.in_parallel(fail, range(8))


@pytest.mark.parametrize(
    ("n_items", "sizes"),
    [(1, [1]), (2, [1, 1]), (3, [3]), (7, [7]), (8, [4, 4]), (9, [5, 4])],
    ids=["one", "one a core", "uneven", "uneven still", "even", "many"],
)
def test_a_batch_is_split_where_all_cores_have_about_as_much_to_do(
    monkeypatch: pytest.MonkeyPatch, n_items: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(torch_threads, "N_CORES", 2)

    parts = torch_threads.split(range(n_items))

    assert [len(part) for part in parts] == sizes
    assert [item for part in parts for item in part] == list(range(n_items))
