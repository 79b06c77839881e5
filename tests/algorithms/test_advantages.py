"""Advantages against the numbers of ExpRL's released functions and closed forms."""

import pytest
import torch

from exprl_megatron.algorithms.advantages import group_normalised, mean_centred
from exprl_megatron.algorithms.scores import group_scores
from exprl_megatron.judging.judgement import Abstained, Scored


def _all_valid(scores):
    return torch.ones(len(scores), dtype=torch.bool)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.0, 0.5, 0.75, 1.0], [-1.317462, -0.146385, 0.439154, 1.024693]),
        ([1.0, 0.0, 0.25], [1.120895, -0.800639, -0.320256]),
        ([0.0, 1.0], [-0.707106, 0.707106]),
        ([0.25, 0.25, 0.5], [-0.577346, -0.577346, 1.154693]),
        ([0.75], [0.749999]),
    ],
)
def test_group_normalised_reproduces_the_released_numbers(scores, expected):
    advantages = group_normalised(torch.tensor(scores), _all_valid(scores))
    assert advantages.tolist() == pytest.approx(expected, abs=1e-6)


def test_an_abstention_changes_nothing_for_the_rest_of_its_group():
    scores = torch.tensor([0.0, 0.5, 99.0, 0.75, 1.0])
    valid = torch.tensor([True, True, False, True, True])
    alone = group_normalised(scores[valid], _all_valid(scores[valid]))
    together = group_normalised(scores, valid)
    assert torch.equal(together[valid], alone)
    assert together[2] == 0
    assert mean_centred(scores, valid).tolist() == pytest.approx([-0.5625, -0.0625, 0.0, 0.1875, 0.4375])


@pytest.mark.parametrize("function", [group_normalised, mean_centred])
def test_one_or_no_valid_trace_of_a_larger_group_gives_zero(function):
    scores = torch.tensor([0.75, 0.5, 0.25])
    assert function(scores, torch.tensor([True, False, False])).tolist() == [0, 0, 0]
    assert function(scores, torch.tensor([False, False, False])).tolist() == [0, 0, 0]


def test_a_group_of_equal_scores_gives_zero():
    assert group_normalised(torch.full((4,), 0.75), torch.ones(4, dtype=torch.bool)).tolist() == [0, 0, 0, 0]


def test_mean_centred_reproduces_the_second_stage_numbers():
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0])
    expected = [0.75, -0.25, -0.25, 0.75, -0.25, -0.25, -0.25, -0.25]
    assert mean_centred(rewards, _all_valid(rewards)).tolist() == pytest.approx(expected, abs=1e-6)


def test_many_groups_at_once_are_the_groups_one_by_one():
    scores = torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.25, 0.5]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    rows = [group_normalised(s, v) for s, v in zip(scores, valid, strict=True)]
    assert torch.equal(group_normalised(scores, valid), torch.stack(rows))


def test_overlong_traces_count_as_zero_only_where_they_were_scored():
    judgements = [Scored(1.0), Scored(0.75), Abstained("timeout"), Scored(0.5)]
    overlong = [True, False, True, False]
    scores, valid = group_scores(judgements, overlong, "zero")
    assert scores.tolist() == [0.0, 0.75, 0.0, 0.5]
    assert valid.tolist() == [True, True, False, True]
    scores, _ = group_scores(judgements, overlong, "score")
    assert scores.tolist() == [1.0, 0.75, 0.0, 0.5]
