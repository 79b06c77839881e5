"""Losses against the numbers of ExpRL's released functions, and their gradients against closed forms."""

import math

import pytest
import torch

from exprl_megatron.algorithms.losses import clipped_policy_loss, k3_divergence, probability_ratio

OLD = [[-1.0, -2.0, -0.5, -1.0], [-0.3, -0.7, 0.0, 0.0]]
NEW = [[-0.6, -2.1, -0.9, 0.4], [-0.3, -1.2, 0.0, 0.0]]
START = [[-0.9, -2.0, -1.0, -0.5], [-0.3, -0.7, 0.0, 0.0]]
ADVANTAGES = [[1.0, 1.0, -1.0, -2.0], [0.5, -0.5, 0.0, 0.0]]


def _tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def _close(tensor, expected, tolerance=1e-6):
    torch.testing.assert_close(tensor, _tensor(expected), atol=tolerance, rtol=0)


def test_the_first_stage_loss_reproduces_the_released_numbers():
    ratio = probability_ratio(_tensor(NEW), _tensor(OLD))
    loss, clipped = clipped_policy_loss(ratio, _tensor(ADVANTAGES), 0.2, 0.28, 3.0)
    _close(loss, [[-1.28, -0.904837, 0.8, 6.0], [-0.5, 0.4, 0.0, 0.0]])
    _close(clipped, [[1, 0, 1, 1], [0, 1, 0, 0]])


def test_k3_reproduces_the_released_numbers():
    divergence = k3_divergence(_tensor(NEW), _tensor(START))
    _close(divergence, [[0.040818, 0.005171, 0.004837, 0.30657], [0.0, 0.148721, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("advantage", "surrogate"), [(0.75, [3.75, 0.828878, 0.013737]), (-0.25, [-1.847264, -0.276293, -0.004579])]
)
def test_the_second_stage_surrogate_has_a_loose_cap_only(advantage, surrogate):
    ratio = probability_ratio(_tensor([1.0, -0.4, -6.0]), _tensor([-1.0, -0.5, -2.0]))
    _close(ratio, [7.389056, 1.105171, 0.018316])
    loss, _ = clipped_policy_loss(ratio, _tensor([advantage] * 3), 4.0, 4.0, None)
    _close(-loss, surrogate)


def test_on_policy_the_gradient_is_that_of_the_plain_policy_gradient():
    log_probs = _tensor([-0.5, -3.0]).requires_grad_()
    advantages = _tensor([0.7, -1.3])
    loss, clipped = clipped_policy_loss(probability_ratio(log_probs, log_probs.detach()), advantages, 0.2, 0.28, 3.0)
    loss.sum().backward()
    torch.testing.assert_close(log_probs.grad, -advantages)
    assert clipped.sum() == 0


def test_a_clipped_token_has_no_gradient():
    log_probs = _tensor([0.0, 0.0, 0.0]).requires_grad_()
    old = _tensor([-1.0, 1.0, -2.0])
    loss, _ = clipped_policy_loss(probability_ratio(log_probs, old), _tensor([1.0, -1.0, -1.0]), 0.2, 0.28, 3.0)
    loss.sum().backward()
    assert log_probs.grad.tolist() == [0, 0, 0]


def test_far_apart_log_probs_stay_finite():
    far, near = _tensor([-500.0, 0.0]), _tensor([0.0, -500.0])
    assert probability_ratio(far, near).tolist() == pytest.approx([math.exp(-20), math.exp(20)])
    assert k3_divergence(far, near).tolist() == [10.0, 10.0]
