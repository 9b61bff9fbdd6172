from __future__ import annotations

import itertools
import random

import pytest
import torch

from feature_extraction_server.core.text_encoder import group_by_length, last_token, mean_of_tokens

LENGTHS = [[7], [9] * 32, list(range(2, 257)), [2, 256, 2, 256], [random.Random(1).randint(2, 256) for _ in range(32)]]
IDS = ["one", "equal", "all", "two kinds", "random"]


@pytest.mark.parametrize("lengths", LENGTHS, ids=IDS)
def test_every_text_is_in_one_group(lengths: list[int]) -> None:
    groups = group_by_length(lengths, 32, 1024)

    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))


@pytest.mark.parametrize("lengths", LENGTHS, ids=IDS)
def test_groups_hold_texts_of_like_length(lengths: list[int]) -> None:
    groups = group_by_length(lengths, 32, 100_000)

    for group in groups:
        longest = max(lengths[index] for index in group)
        assert sum(longest - lengths[index] for index in group) <= 32
    for longer, shorter in itertools.pairwise(groups):
        assert lengths[longer[-1]] >= lengths[shorter[0]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=IDS)
def test_groups_of_more_than_one_text_keep_to_the_number_of_tokens(lengths: list[int]) -> None:
    groups = group_by_length(lengths, 100_000, 300)

    assert all(len(group) == 1 or len(group) * lengths[group[0]] <= 300 for group in groups)


def test_texts_of_one_length_are_one_group() -> None:
    assert group_by_length([9] * 32, 32, 9 * 32) == [list(range(32))]


def test_text_with_more_tokens_than_a_group_may_have_is_a_group() -> None:
    assert group_by_length([5, 500, 6], 32, 100) == [[1], [2, 0]]


def test_mean_leaves_padding_out() -> None:
    states = torch.tensor([[[1.0], [3.0], [5.0]], [[2.0], [4.0], [100.0]]])

    assert mean_of_tokens(states, torch.tensor([[3], [2]])).tolist() == [[3.0], [3.0]]
    assert mean_of_tokens(states[:, :2], torch.tensor([[2], [2]])).tolist() == [[2.0], [3.0]]


def test_last_token_is_the_last_before_the_padding() -> None:
    states = torch.tensor([[[1.0], [3.0], [5.0]], [[2.0], [4.0], [100.0]]])

    assert last_token(states, torch.tensor([[3], [2]])).tolist() == [[5.0], [4.0]]
