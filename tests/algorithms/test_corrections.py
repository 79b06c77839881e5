"""Importance weights in closed form, and the gradient that they give in expectation over everything sampled."""

import math

import pytest
import torch

from exprl_megatron.algorithms.batch import MicroBatch, TrainSample, pad
from exprl_megatron.algorithms.corrections import correction_weights, importance_ratio, masked, truncated
from exprl_megatron.algorithms.objective import policy_objective
from exprl_megatron.config.losses import CorrectionConfig, LossConfig

EXACT = {"kind": "truncated", "high": 1e6}
ARMS = (1.0, 0.2)
PATH_REWARDS = {(0, 0): 1.0, (0, 1): 0.0, (1, 0): 0.3, (1, 1): 0.8}


def _tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def test_ratios_of_tokens_of_the_response_and_of_its_mean_token():
    old, sampler = _tensor([[-1.0, -2.0, -9.0], [-0.5, -9.0, -9.0]]), _tensor([[-1.5, -1.8, 0.0], [-0.5, 0.0, 0.0]])
    mask = _tensor([[1, 1, 0], [1, 0, 0]])
    token = importance_ratio(old, sampler, mask, "token")
    torch.testing.assert_close(token[:, :2], _tensor([[math.exp(0.5), math.exp(-0.2)], [1, 1]]))
    sequence = importance_ratio(old, sampler, mask, "sequence")
    torch.testing.assert_close(sequence, _tensor([[math.exp(0.3)] * 3, [1] * 3]))
    geometric = importance_ratio(old, sampler, mask, "geometric")
    torch.testing.assert_close(geometric, _tensor([[math.exp(0.15)] * 3, [1] * 3]))


def test_far_apart_policies_have_a_finite_ratio():
    far = importance_ratio(_tensor([[0.0, -900.0]]), _tensor([[-900.0, 0.0]]), _tensor([[1, 1]]), "token")
    assert far.tolist() == [[math.exp(20), math.exp(-20)]]


def test_truncation_caps_and_masking_drops():
    ratio = _tensor([0.4, 0.5, 1.0, 2.0, 2.5])
    assert truncated(ratio, 2.0).tolist() == [0.4, 0.5, 1.0, 2.0, 2.0]
    assert masked(ratio, 0.5, 2.0).tolist() == [0.0, 0.5, 1.0, 2.0, 0.0]


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("kind", ["truncated", "masked"])
def test_what_the_old_policy_sampled_itself_has_the_weight_one(kind, level):
    log_probs = _tensor([[-0.3, -4.0]])
    weights, _ = correction_weights(
        CorrectionConfig(kind=kind, level=level), log_probs, log_probs, torch.ones_like(log_probs)
    )
    assert weights.tolist() == [[1.0, 1.0]]


def _objective(correction):
    """The policy gradient alone, summed over tokens."""
    return policy_objective(LossConfig(kl_coefficient=0.0, aggregation="sequence-sum", correction=correction))


def _expected_gradient(logits, samplers, rewards, correction, old_logits=None):
    """Of the loss over every path of arms, by the chance that the samplers take it.

    Row c of a table of logits [contexts, arms] is for the first token (0), or for the second after arm c - 1.
    """
    total, objective = torch.zeros((), dtype=torch.float64), _objective(correction)
    for path, reward in rewards.items():
        log_probs, sampler = (_path_log_probs(table, path)[None] for table in (logits, samplers))
        ones = torch.ones_like(sampler)
        old = None if old_logits is None else _path_log_probs(old_logits, path)[None]
        batch = MicroBatch(torch.tensor([path]), ones, reward * ones, sampler, old, None)
        total = total + sampler.sum().exp() * objective(log_probs, 0 * ones, batch)[0]
    return -torch.autograd.grad(total, logits)[0]


def _path_log_probs(logits, path):
    contexts = [0, *(1 + arm for arm in path[:-1])]
    return torch.stack([logits[c].log_softmax(-1)[arm] for c, arm in zip(contexts, path, strict=True)])


def _true_gradient(logits, rewards):
    value = sum(_path_log_probs(logits, path).sum().exp() * reward for path, reward in rewards.items())
    return torch.autograd.grad(value, logits)[0]


def _two_updates_on(logits, rewards):
    """The weights after two steps of gradient ascent: what was sampled by `logits` is then two versions old."""
    for _ in range(2):
        logits = (logits + 2.0 * _true_gradient(logits, rewards)).detach().requires_grad_()
    return logits


ONE_STEP = {(arm,): reward for arm, reward in enumerate(ARMS)}


def _bandit():
    stale = _tensor([[-0.7, 0.4]]).requires_grad_()
    return stale.detach(), _two_updates_on(stale, ONE_STEP)


def test_two_arms_at_staleness_two_have_the_closed_form_gradient_with_the_correction_and_not_without():
    stale, current = _bandit()
    p = torch.sigmoid(current[0, 0] - current[0, 1]).item()
    q = torch.sigmoid(stale[0, 0] - stale[0, 1]).item()
    slope = p * (1 - p) * (ARMS[0] - ARMS[1])
    corrected = _expected_gradient(current, stale, ONE_STEP, EXACT)
    torch.testing.assert_close(corrected, _tensor([[slope, -slope]]))
    # sum over arms of b(a) r(a) d log p(a), which is not the gradient of anything
    uncorrected = q * ARMS[0] * (1 - p) - (1 - q) * ARMS[1] * p
    found = _expected_gradient(current, stale, ONE_STEP, {"kind": "none"})
    torch.testing.assert_close(found, _tensor([[uncorrected, -uncorrected]]))
    assert abs(uncorrected - slope) > 0.2 * slope


@pytest.mark.parametrize(("kind", "high"), [("truncated", 1.1), ("truncated", 1.3), ("masked", 1.3)])
def test_what_truncation_and_masking_cost_is_the_weight_that_they_take_away(kind, high):
    stale, current = _bandit()
    p, b = current[0].softmax(-1).tolist(), stale[0].softmax(-1).tolist()
    ratios = [new / old for new, old in zip(p, b, strict=True)]
    assert max(ratios) > 1.3, "the bound must matter"
    weights = [min(w, high) if kind == "truncated" else w * (0.5 <= w <= high) for w in ratios]
    lost = [old * (full - kept) for old, full, kept in zip(b, ratios, weights, strict=True)]
    bias = -lost[0] * ARMS[0] * (1 - p[0]) + lost[1] * ARMS[1] * p[0]
    true = _true_gradient(current, ONE_STEP)[0, 0].item()
    found = _expected_gradient(current, stale, ONE_STEP, {"kind": kind, "high": high})
    assert found[0, 0].item() == pytest.approx(true + bias)
    assert abs(bias) <= sum(lost) * max(ARMS)
    if kind == "truncated":
        # lost = E_b[(w - high)+], which falls as the bound rises: the bias is bounded by the tail alone
        assert sum(lost) == pytest.approx(sum(old * max(0.0, w - high) for old, w in zip(b, ratios, strict=True)))


def _paths():
    """Two tokens, and two weight versions: the first token was drawn two updates ago, the second one update ago."""
    start = _tensor([[-0.7, 0.4], [0.2, 0.0], [-0.3, 0.6]]).requires_grad_()
    between = (start + 2.0 * _true_gradient(start, PATH_REWARDS)).detach().requires_grad_()
    current = (between + 2.0 * _true_gradient(between, PATH_REWARDS)).detach().requires_grad_()
    return torch.cat([start[:1], between[1:]]).detach(), current


def test_a_trace_of_two_weight_versions_is_corrected_exactly_by_its_sequence_and_nearly_by_its_tokens():
    sampler, current = _paths()
    true = _true_gradient(current, PATH_REWARDS)

    def error(correction):
        return ((_expected_gradient(current, sampler, PATH_REWARDS, correction) - true).norm() / true.norm()).item()

    assert error(EXACT | {"level": "sequence"}) < 1e-6
    assert 1e-3 < error(EXACT) < error({"kind": "none"})
    assert error(EXACT | {"level": "geometric"}) > 1e-3


def test_with_old_log_probs_the_weight_leads_to_the_old_policy_and_ppos_ratio_from_there():
    stale, current = _bandit()
    old = (current + _tensor([[0.05, -0.05]])).detach()
    found = _expected_gradient(current, stale, ONE_STEP, EXACT, old_logits=old)
    # p_old / b times p / p_old is p / b: the very same gradient, as long as no clip decides
    torch.testing.assert_close(found, _true_gradient(current, ONE_STEP))


def _batch(**fields):
    return pad([TrainSample((1,), (2, 3), (1.0, -1.0), **fields)], 3)


def test_weights_fall_on_the_surrogate_alone_and_are_counted():
    batch = _batch(rollout_log_probs=(-1.0, -3.0), old_log_probs=(-0.5, -3.5), ref_log_probs=(-0.5, -3.0))
    log_probs, entropy = torch.tensor([[-0.5, -3.5, -7.0]]), torch.full((1, 3), 0.5)
    config = LossConfig(correction={"kind": "truncated", "high": 1.2}, kl_coefficient=0.1, entropy_coefficient=0.2)
    loss, metrics = policy_objective(config)(log_probs, entropy, batch)
    low = math.exp(-0.5)
    kl = math.exp(0.5) - 0.5 - 1
    assert loss.item() == pytest.approx(-1.2 + low + 0.1 * kl - 0.2 * 0.5 * 2, rel=1e-5)
    assert metrics["correction/weight"].item() == pytest.approx(1.2 + low)
    assert metrics["correction/squared"].item() == pytest.approx(1.2**2 + low**2)
    assert metrics["correction/bounded"].item() == 1
    assert metrics["correction/ratio/max"].item() == pytest.approx(math.exp(0.5))


def test_a_correction_without_the_samplers_log_probs_is_refused():
    with pytest.raises(ValueError, match="no log-probs of the sampler"):
        _objective(EXACT)(torch.zeros(1, 3), torch.zeros(1, 3), _batch())


@pytest.mark.parametrize("surrogate", ["clip", "sequence-clip", "clipped-weight"])
def test_every_surrogate_is_weighted(surrogate):
    batch = _batch(rollout_log_probs=(-1.0, -3.0))
    gradients = []
    for correction in ({"kind": "none"}, EXACT):
        log_probs = torch.tensor([[-0.5, -3.5, -7.0]]).requires_grad_()
        config = LossConfig(surrogate=surrogate, dual_clip=None, kl_coefficient=0.0, correction=correction)
        policy_objective(config)(log_probs, torch.zeros(1, 3), batch)[0].backward()
        gradients.append(log_probs.grad[0, :2])
    torch.testing.assert_close(gradients[1], gradients[0] * torch.tensor([math.exp(0.5), math.exp(-0.5)]))
