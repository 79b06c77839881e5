"""Advantages against the numbers of ExpRL's and verl's released functions, numpy and closed forms."""

from typing import get_args

import numpy
import pytest
import torch

from exprl_megatron.algorithms.advantages import (
    advantage_fn,
    batch_normalized,
    group_centered_batch_normalized,
    group_normalized,
    has_variance,
    leave_one_out,
    mean_centered,
)
from exprl_megatron.algorithms.scores import group_scores
from exprl_megatron.config.losses import Advantage
from exprl_megatron.judging.judgement import Abstained, Scored

GROUPS = [[0.0, 0.5, 0.75, 1.0], [0.25, 0.25, 0.0, 0.25], [1.0, 0.0, 0.0, 1.0]]
"""Three groups of four, for what looks at a whole batch."""


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
def test_group_normalized_reproduces_the_released_numbers(scores, expected):
    advantages = group_normalized(torch.tensor(scores), _all_valid(scores))
    assert advantages.tolist() == pytest.approx(expected, abs=1e-6)


def test_an_abstention_changes_nothing_for_the_rest_of_its_group():
    scores = torch.tensor([0.0, 0.5, 99.0, 0.75, 1.0])
    valid = torch.tensor([True, True, False, True, True])
    alone = group_normalized(scores[valid], _all_valid(scores[valid]))
    together = group_normalized(scores, valid)
    assert torch.equal(together[valid], alone)
    assert together[2] == 0
    assert mean_centered(scores, valid).tolist() == pytest.approx([-0.5625, -0.0625, 0.0, 0.1875, 0.4375])


@pytest.mark.parametrize("function", [group_normalized, mean_centered, leave_one_out, group_centered_batch_normalized])
def test_one_or_no_valid_trace_of_a_larger_group_gives_zero(function):
    scores = torch.tensor([0.75, 0.5, 0.25])
    assert function(scores, torch.tensor([True, False, False])).tolist() == [0, 0, 0]
    assert function(scores, torch.tensor([False, False, False])).tolist() == [0, 0, 0]


def test_a_group_of_equal_scores_gives_zero():
    assert group_normalized(torch.full((4,), 0.75), torch.ones(4, dtype=torch.bool)).tolist() == [0, 0, 0, 0]


def test_mean_centered_reproduces_the_second_stage_numbers():
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0])
    expected = [0.75, -0.25, -0.25, 0.75, -0.25, -0.25, -0.25, -0.25]
    assert mean_centered(rewards, _all_valid(rewards)).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            leave_one_out,
            [
                [-0.75, -0.08333333, 0.25, 0.58333333],
                [0.08333333, 0.08333333, -0.25, 0.08333333],
                [0.66666667, -0.66666667, -0.66666667, 0.66666667],
            ],
        ),
        (
            batch_normalized,
            [
                [-0.99818673, 0.19963735, 0.79854939, 1.39746143],
                [-0.39927469, -0.39927469, -0.99818673, -0.39927469],
                [1.39746143, -0.99818673, -0.99818673, 1.39746143],
            ],
        ),
        (
            group_centered_batch_normalized,
            [
                [-1.4777765, -0.16419739, 0.49259217, 1.14938172],
                [0.16419739, 0.16419739, -0.49259217, 0.16419739],
                [1.31357911, -1.31357911, -1.31357911, 1.31357911],
            ],
        ),
    ],
)
def test_rloo_and_reinforce_plus_plus_reproduce_the_numbers_of_verl_on_traces_of_one_token(function, expected):
    scores = torch.tensor(GROUPS)
    found = function(scores, torch.ones_like(scores, dtype=torch.bool))
    # The two differ in where the small constant is: std + 1e-6 here, sqrt(variance + 1e-8) there.
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)


def test_leave_one_out_is_the_score_less_the_mean_of_the_others():
    scores = [0.0, 0.5, 0.75, 1.0]
    expected = [s - numpy.mean(scores[:i] + scores[i + 1 :]) for i, s in enumerate(scores)]
    assert leave_one_out(torch.tensor(scores), _all_valid(scores)).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", get_args(Advantage))
def test_an_invalid_score_is_worth_nothing_to_any_estimator(name):
    valid = torch.tensor([[True, True, False, True], [True, False, False, False], [True, True, True, True]])
    scores = torch.tensor(GROUPS)
    found = advantage_fn(name)(scores, valid)
    assert found.dtype == torch.float64
    assert (found[~valid] == 0).all()
    assert torch.equal(advantage_fn(name)(scores.masked_fill(~valid, 1e9), valid), found)


def test_batch_statistics_are_those_of_the_valid_scores_alone():
    valid = torch.tensor([[True, True, False, True], [True, False, False, False], [True, True, True, True]])
    kept = numpy.array(GROUPS)[valid.numpy()]
    expected = (kept - kept.mean()) / kept.std(ddof=1)
    assert batch_normalized(torch.tensor(GROUPS), valid)[valid].tolist() == pytest.approx(expected, abs=1e-5)
    # The second group's only valid trace is no deviation, and not one of the seven that make the std.
    centred = numpy.concatenate([group - group.mean() for group in (kept[:3], kept[4:])])
    found = group_centered_batch_normalized(torch.tensor(GROUPS), valid)
    valid[1] = False
    assert found[valid].tolist() == pytest.approx(centred / centred.std(ddof=1), abs=1e-5)
    assert (found[1] == 0).all()


@pytest.mark.parametrize("function", [mean_centered, leave_one_out, group_centered_batch_normalized])
def test_a_group_of_one_has_nothing_to_be_compared_with(function):
    assert function(torch.tensor([[0.75], [0.5]]), torch.ones(2, 1, dtype=torch.bool)).tolist() == [[0], [0]]


def test_dynamic_sampling_keeps_the_groups_whose_valid_scores_differ():
    scores = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.25, 0.5, 0.5], [1.0, 0.0, 0.0]])
    valid = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1], [0, 0, 0]]).bool()
    assert has_variance(scores, valid).tolist() == [True, False, False, True, False]
    assert has_variance(scores[0], valid[0]).item()


def test_many_groups_at_once_are_the_groups_one_by_one():
    scores = torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.25, 0.5]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    rows = [group_normalized(s, v) for s, v in zip(scores, valid, strict=True)]
    assert torch.equal(group_normalized(scores, valid), torch.stack(rows))


def test_overlong_traces_count_as_zero_only_where_they_were_scored():
    judgements = [Scored(1.0), Scored(0.75), Abstained("timeout"), Scored(0.5)]
    overlong = [True, False, True, False]
    scores, valid = group_scores(judgements, overlong, "zero")
    assert scores.tolist() == [0.0, 0.75, 0.0, 0.5]
    assert valid.tolist() == [True, True, False, True]
    scores, _ = group_scores(judgements, overlong, "score")
    assert scores.tolist() == [1.0, 0.75, 0.0, 0.5]
