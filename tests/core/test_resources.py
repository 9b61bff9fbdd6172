"""What a model takes of the machine."""

from __future__ import annotations

import os
from types import ModuleType

import pytest

from feature_extraction_server.core.resources import device_of, resident_bytes


def module(**variables: object) -> ModuleType:
    made = ModuleType("made")
    vars(made).update(variables)
    return made


def test_device_is_that_of_the_weights() -> None:
    torch = pytest.importorskip("torch")

    assert device_of(module(count=1, network=torch.nn.Linear(1, 1, device="meta"))) == "meta"


def test_device_of_a_model_without_weights_is_unknown() -> None:
    torch = pytest.importorskip("torch")

    assert device_of(module(count=1, network=torch.nn.ReLU())) is None


def test_device_that_a_model_states_itself_counts() -> None:
    assert device_of(module(device="npu")) == "npu"


def test_memory_is_that_of_all_processes_together() -> None:
    one = resident_bytes([os.getpid()])
    two = resident_bytes([os.getpid(), os.getpid()])

    assert one is not None
    assert two is not None
    assert two > 1.5 * one


@pytest.mark.parametrize("pids", [[], [2**22 + 1]], ids=["none", "one that has ended"])
def test_memory_of_no_process_is_unknown(pids: list[int]) -> None:
    assert resident_bytes(pids) is None
