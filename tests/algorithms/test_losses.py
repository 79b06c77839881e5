"""Losses against the numbers of ExpRL's and verl's released functions, and their gradients against closed forms."""

import math

import pytest
import torch

from exprl_megatron.algorithms.losses import (
    clipped_policy_loss,
    clipped_weight_loss,
    distillation_loss,
    k3_divergence,
    probability_ratio,
    sequence_ratio,
    unbiased_divergence,
)

OLD = [[-1.0, -2.0, -0.5, -1.0], [-0.3, -0.7, 0.0, 0.0]]
NEW = [[-0.6, -2.1, -0.9, 0.4], [-0.3, -1.2, 0.0, 0.0]]
START = [[-0.9, -2.0, -1.0, -0.5], [-0.3, -0.7, 0.0, 0.0]]
ADVANTAGES = [[1.0, 1.0, -1.0, -2.0], [0.5, -0.5, 0.0, 0.0]]
MASK = [[1, 1, 1, 1], [1, 1, 0, 0]]


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


def test_a_sequence_ratio_is_the_geometric_mean_of_its_tokens_ratios():
    old, new = _tensor(OLD), _tensor(NEW) + _tensor([[0] * 4, [0, 0, 5, 5]])
    ratio = sequence_ratio(new, old, _tensor(MASK))
    first = (math.exp(0.4) * math.exp(-0.1) * math.exp(-0.4) * math.exp(1.4)) ** (1 / 4)
    _close(ratio[0], [first] * 4)
    _close(ratio[1, :2], [math.sqrt(math.exp(0.0) * math.exp(-0.5))] * 2)


@pytest.mark.parametrize(
    ("clip_low", "clip_high", "advantages", "loss", "gradient"),
    [
        (0.2, 0.5, [[1] * 4, [-0.5] * 4], -0.49201532, [[-0.17300383] * 4, [0] * 4]),
        (3e-4, 4e-4, [[1] * 4, [-0.5] * 4], -0.250275, [[0] * 4, [0] * 4]),
        (0.2, 0.3, ADVANTAGES, 0.19666139, [[0, 0, 0.17300383, 0.34600766], [-0.0973501, 0, 0, 0]]),
    ],
)
def test_gspo_reproduces_loss_and_gradient_of_verl(clip_low, clip_high, advantages, loss, gradient):
    log_probs, mask = _tensor(NEW).requires_grad_(), _tensor(MASK)
    ratio = sequence_ratio(log_probs, _tensor(OLD), mask)
    tokens, _ = clipped_policy_loss(ratio, _tensor(advantages), clip_low, clip_high, None)
    total = ((tokens * mask).sum(-1) / mask.sum(-1)).mean()
    total.backward()
    assert total.item() == pytest.approx(loss, abs=1e-6)
    _close(log_probs.grad, gradient)


@pytest.mark.parametrize("advantage", [0.7, -0.7])
def test_gspos_gradient_is_that_of_the_papers_sequence_objective(advantage):
    log_probs, old = _tensor(NEW[0]).requires_grad_(), _tensor(OLD[0])
    ratio = ((log_probs - old).sum() / 4).exp()
    (expected,) = torch.autograd.grad(-torch.min(ratio * advantage, ratio.clamp(0.5, 2.0) * advantage), log_probs)
    row = log_probs[None]
    loss, _ = clipped_policy_loss(
        sequence_ratio(row, old[None], torch.ones_like(row)), torch.full_like(row, advantage), 0.5, 1.0, None
    )
    (found,) = torch.autograd.grad(loss.mean(), log_probs)
    torch.testing.assert_close(found, expected)
    assert expected.abs().min() > 0


@pytest.mark.parametrize(
    ("clip_low", "loss", "gradient", "clipped"),
    [
        (
            0.2,
            0.44035976,
            [[-0.21333333, -0.15080624, 0.13333333, 0.42666667], [-0.08333333, 0.06666667, 0, 0]],
            [[1, 0, 1, 1], [0, 1, 0, 0]],
        ),
        (
            1.0,
            0.47915869,
            [[-0.21333333, -0.15080624, 0.11172001, 0.42666667], [-0.08333333, 0.05054422, 0, 0]],
            [[1, 0, 0, 1], [0, 0, 0, 0]],
        ),
    ],
)
def test_cispo_reproduces_loss_and_gradient_of_verl(clip_low, loss, gradient, clipped):
    log_probs = _tensor(NEW).requires_grad_()
    ratio = probability_ratio(log_probs, _tensor(OLD))
    tokens, where = clipped_weight_loss(log_probs, ratio, _tensor(ADVANTAGES), clip_low, 0.28)
    total = tokens.sum() / 6
    total.backward()
    assert total.item() == pytest.approx(loss, abs=1e-6)
    _close(log_probs.grad, gradient)
    _close(where, clipped)


def test_cispo_on_policy_has_the_gradient_of_the_clip():
    log_probs = _tensor(NEW).requires_grad_()
    ratio = probability_ratio(log_probs, log_probs.detach())
    loss, _ = clipped_weight_loss(log_probs, ratio, _tensor(ADVANTAGES), 0.2, 0.28)
    loss.sum().backward()
    _close(-log_probs.grad, ADVANTAGES)


def test_self_distillation_reproduces_the_released_numbers():
    student = _tensor([[-0.5, -1.0, -2.0], [-0.1, -3.0, 0.0]]).requires_grad_()
    teacher = _tensor([[-0.7, -0.4, -2.5], [-0.1, -1.0, 0.0]])
    loss, difference = distillation_loss(student, teacher)
    _close(difference, [[0.2, -0.6, 0.5], [0.0, -2.0, 0.0]])
    (loss.sum() / 5).backward()
    assert loss.sum().item() / 5 == pytest.approx(1.1, abs=1e-6)
    _close(student.grad, [[0.04, -0.12, 0.1], [0.0, -0.4, 0.0]])


def test_self_distillations_expected_gradient_is_that_of_the_kl_to_the_teacher():
    logits, teacher = _tensor([0.3, -1.0, 0.8]).requires_grad_(), _tensor([1.0, 0.2, -0.5]).log_softmax(0)
    student = logits.log_softmax(0)
    divergence = (student.exp() * (student - teacher)).sum()
    (expected,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    loss, difference = distillation_loss(student, teacher)
    (found,) = torch.autograd.grad((student.exp().detach() * loss).sum(), logits)
    torch.testing.assert_close(found, expected)
    assert (student.exp() * difference).sum().item() == pytest.approx(divergence.item())


def test_the_expected_gradients_of_the_kl_terms_are_those_of_the_two_directions():
    # Every token of a vocabulary of six, by its probability under the policy that sampled; exact KLs by autograd.
    draw = torch.Generator().manual_seed(0)
    logits, start, old = (torch.randn(6, generator=draw, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    start, old = start.log_softmax(0), old.log_softmax(0)

    def gradient(loss):
        return torch.autograd.grad(loss, logits)[0]

    policy = logits.log_softmax(0)
    forward = gradient((policy.exp() * (policy - start)).sum())
    policy = logits.log_softmax(0)
    backward = gradient((start.exp() * (start - policy)).sum())
    for sampled_by in (policy.detach(), old):
        policy = logits.log_softmax(0)
        unbiased = gradient((sampled_by.exp() * unbiased_divergence(policy, start, sampled_by)).sum())
        torch.testing.assert_close(unbiased, forward)
    policy = logits.log_softmax(0)
    torch.testing.assert_close(gradient((policy.detach().exp() * k3_divergence(policy, start)).sum()), backward)
    assert (forward - backward).norm() > 0.1
    torch.testing.assert_close(unbiased_divergence(policy, start, old), k3_divergence(policy, start))
