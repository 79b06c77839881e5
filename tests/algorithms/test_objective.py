"""The objectives sum over response tokens only, and their terms add up as the papers write them."""

import math

import pytest
import torch

from exprl_megatron.algorithms.batch import TrainSample, pad
from exprl_megatron.algorithms.mismatch import log_prob_gap
from exprl_megatron.algorithms.objective import distillation_objective, policy_objective, supervised_objective
from exprl_megatron.config.losses import LossConfig, SparseLossConfig

OLD = ((-1.0, -2.0, -0.5, -1.0), (-0.3, -0.7))
NEW = ((-0.6, -2.1, -0.9, 0.4), (-0.3, -1.2))
START = ((-0.9, -2.0, -1.0, -0.5), (-0.3, -0.7))
ADVANTAGES = ((1.0, 1.0, -1.0, -2.0), (0.5, -0.5))
TOKENS = 6


def _batch(**given):
    """Two sequences with prompts of two tokens and responses of four and two, as one micro-batch."""
    rows = [
        TrainSample(
            (1, 2), tuple(range(3, 3 + len(OLD[row]))), ADVANTAGES[row], **{k: v[row] for k, v in given.items()}
        )
        for row in (0, 1)
    ]
    return pad(rows, 8)


def _outputs():
    """Log-probs and entropies as a model gives them: something at every position, padding included."""
    log_probs, entropy = torch.full((2, 8), -7.0), torch.full((2, 8), 0.5)
    for row in (0, 1):
        log_probs[row, 1 : 1 + len(NEW[row])] = torch.tensor(NEW[row])
    return log_probs.requires_grad_(), entropy


def test_the_first_stage_objective_reproduces_the_released_loss():
    config = LossConfig(clip_low=0.2, clip_high=0.28, dual_clip=3.0, kl_coefficient=1e-3)
    loss, metrics = policy_objective(config)(*_outputs(), _batch(old_log_probs=OLD, ref_log_probs=START))
    assert loss.item() / TOKENS == pytest.approx(0.752611, abs=1e-6)
    assert metrics["loss/policy"].item() / TOKENS == pytest.approx(0.752527, abs=1e-6)
    assert metrics["kl/ref"].item() / TOKENS == pytest.approx(0.084353, abs=1e-6)
    assert metrics["clip_share"].item() / TOKENS == pytest.approx(4 / 6)
    assert metrics["entropy"].item() / TOKENS == pytest.approx(0.5)


def test_without_old_log_probs_the_step_is_on_policy():
    log_probs, entropy = _outputs()
    loss, metrics = policy_objective(LossConfig(kl_coefficient=0.0))(log_probs, entropy, _batch())
    loss.backward()
    assert metrics["ratio"].item() == TOKENS
    assert metrics["clip_share"].item() == 0
    assert log_probs.grad[0].tolist() == [0, -1, -1, 1, 2, 0, 0, 0]
    assert log_probs.grad[1].tolist() == [0, -0.5, 0.5, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("advantage", "surrogate"),
    [(0.75, (3.75, 0.828878, 0.013737)), (-0.25, (-1.847264, -0.276293, -0.004579))],
)
def test_the_ratio_to_the_sampler_is_the_released_second_stage(advantage, surrogate):
    # The vector stage2_pipelinerl: min(r A, clip(r, -3, 5) A), r to the log-probs that the sampler reported.
    rollout, new = (-1.0, -0.5, -2.0), (1.0, -0.4, -6.0)
    batch = pad([TrainSample((1,), (3, 4, 5), (advantage,) * 3, rollout_log_probs=rollout)], 4)
    log_probs = torch.tensor([[*new, -7.0]]).requires_grad_()
    config = SparseLossConfig(use_rollout_log_probs=True)
    loss, metrics = policy_objective(config)(log_probs, torch.full((1, 4), 0.5), batch)
    assert loss.item() == pytest.approx(-sum(surrogate) - 1e-4 * 0.5 * 3, abs=1e-5)
    loss.backward()
    # d(r A)/d(log p) = r A; beyond the bound of 5 a positive advantage has no gradient, a negative one keeps its own.
    ratios = [math.exp(n - r) for n, r in zip(new, rollout, strict=True)]
    expected = [0.0 if ratio > 5 and advantage > 0 else -ratio * advantage for ratio in ratios]
    assert log_probs.grad[0].tolist() == pytest.approx([*expected, 0.0], abs=1e-5)
    # The gap that is watched is still that between trainer and sampler.
    gaps = [abs(n - r) for n, r in zip(new, rollout, strict=True)]
    assert metrics["sampler_gap/mean"].item() == pytest.approx(sum(gaps), abs=1e-5)
    # debug.assertions compares with 0: before the first update no weight has changed.
    assert metrics["kl/old"].item() == 0


def test_the_ratio_to_the_sampler_needs_its_log_probs():
    with pytest.raises(ValueError, match="has no log-probs of the sampler"):
        policy_objective(SparseLossConfig(use_rollout_log_probs=True))(*_outputs(), _batch(old_log_probs=OLD))


def test_the_entropy_bonus_is_taken_off_the_loss():
    plain, _ = policy_objective(SparseLossConfig(entropy_coefficient=0.0))(*_outputs(), _batch(old_log_probs=OLD))
    bonus, _ = policy_objective(SparseLossConfig(entropy_coefficient=0.1))(*_outputs(), _batch(old_log_probs=OLD))
    assert (plain - bonus).item() == pytest.approx(0.1 * 0.5 * TOKENS, abs=1e-5)


def test_a_kl_term_without_start_log_probs_is_refused():
    with pytest.raises(ValueError, match="reference policy"):
        policy_objective(LossConfig(kl_coefficient=0.1))(*_outputs(), _batch())


def test_the_gap_to_the_sampler_is_measured_on_the_old_log_probs():
    batch = _batch(old_log_probs=OLD, rollout_log_probs=START)
    _, metrics = policy_objective(LossConfig(kl_coefficient=0.0))(*_outputs(), batch)
    assert metrics["sampler_gap/mean"].item() == pytest.approx(0.1 + 0 + 0.5 + 0.5)
    assert metrics["sampler_gap/max"].item() == 0.5


def test_the_gap_to_the_sampler_leaves_out_what_older_weights_sampled():
    batch = _batch(old_log_probs=OLD, rollout_log_probs=START, on_policy_mask=((1.0, 0.0, 0.0, 1.0), (0.0, 1.0)))
    _, metrics = policy_objective(LossConfig(kl_coefficient=0.0))(*_outputs(), batch)
    assert metrics["sampler_gap/mean"].item() == pytest.approx(0.1 + 0.5)
    assert metrics["sampler_gap/tokens"].item() == 3


def test_log_prob_gap_has_sum_maximum_and_k3_over_the_masked_tokens():
    trainer, sampler = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-1.5, -1.75, 0.0]])
    gap = log_prob_gap(trainer, sampler, torch.tensor([[1.0, 1.0, 0.0]]))
    assert gap.absolute.item() == pytest.approx(0.75)
    assert gap.largest.item() == 0.5
    # e^d - d - 1 at d = 0.5 and d = -0.25
    assert gap.k3.item() == pytest.approx(0.1487212707 + 0.0288007831)


def test_the_supervised_objective_is_the_summed_negative_log_likelihood():
    loss, metrics = supervised_objective()(*_outputs(), _batch())
    assert loss.item() == pytest.approx(-sum(NEW[0]) - sum(NEW[1]))
    assert metrics["loss"].item() == loss.item()


def test_two_micro_batches_sum_to_one_large_one():
    objective = policy_objective(LossConfig(kl_coefficient=1e-3))
    batch = _batch(old_log_probs=OLD, ref_log_probs=START)
    log_probs, entropy = _outputs()
    whole, _ = objective(log_probs, entropy, batch)
    halves = []
    for row in (0, 1):
        sequence = TrainSample((1, 2), tuple(range(3, 3 + len(OLD[row]))), ADVANTAGES[row], None, OLD[row], START[row])
        length = len(sequence)
        loss, _ = objective(log_probs[row : row + 1, :length], entropy[row : row + 1, :length], pad([sequence], length))
        halves.append(loss)
    torch.testing.assert_close(whole, halves[0] + halves[1])


def test_the_released_codes_aggregation_of_one_micro_batch_is_the_released_loss():
    config = LossConfig(aggregation="micro-batch-mean")
    loss, _ = policy_objective(config)(*_outputs(), _batch(old_log_probs=OLD, ref_log_probs=START))
    assert loss.item() / 2 == pytest.approx(0.752611, abs=1e-6)


def test_the_second_stage_is_the_sum_over_tokens_by_the_number_of_samples():
    rows = [TrainSample((1,), (2, 3, 4), (advantage,) * 3, None, (-1.0, -0.5, -2.0)) for advantage in (0.75, -0.25)]
    log_probs = torch.zeros(2, 4)
    log_probs[:, :3] = torch.tensor([1.0, -0.4, -6.0])
    loss, _ = policy_objective(SparseLossConfig())(log_probs, torch.full((2, 4), 0.5), pad(rows, 4))
    surrogate = 3.75 + 0.828878 + 0.013737 - 1.847264 - 0.276293 - 0.004579
    assert loss.item() / 2 == pytest.approx(-(surrogate + 1e-4 * 0.5 * 6) / 2, abs=1e-5)


def test_gspo_and_cispo_go_through_the_objective_with_their_own_ratio_and_clip_share():
    batch = _batch(old_log_probs=OLD)
    config = {"dual_clip": None, "kl_coefficient": 0.0, "clip_low": 0.2, "clip_high": 0.3}
    gspo = LossConfig(surrogate="sequence-clip", aggregation="sequence-mean", **config)
    loss, metrics = policy_objective(gspo)(*_outputs(), batch)
    assert loss.item() / 2 == pytest.approx(0.19666139, abs=1e-6)
    assert metrics["ratio"].item() == pytest.approx(4 * 1.384031 + 2 * 0.778801, abs=1e-5)
    assert metrics["clip_share"].item() == 3
    cispo = LossConfig(surrogate="clipped-weight", **config | {"clip_low": 1.0, "clip_high": 0.28})
    loss, metrics = policy_objective(cispo)(*_outputs(), batch)
    assert loss.item() / TOKENS == pytest.approx(0.47915869, abs=1e-6)
    assert metrics["clip_share"].item() == 2


@pytest.mark.parametrize(
    ("aggregation", "denominator", "expected"), [("token-mean", 5, 1.1), ("sequence-mean", 2, 1.416667)]
)
def test_self_distillation_reproduces_the_released_loss(aggregation, denominator, expected):
    student, teacher = ((-0.5, -1.0, -2.0), (-0.1, -3.0)), ((-0.7, -0.4, -2.5), (-0.1, -1.0))
    rows = [TrainSample((1, 2), (3,) * len(teacher[row]), ref_log_probs=teacher[row]) for row in (0, 1)]
    log_probs = torch.full((2, 6), -7.0)
    for row in (0, 1):
        log_probs[row, 1 : 1 + len(student[row])] = torch.tensor(student[row])
    log_probs.requires_grad_()
    loss, metrics = distillation_objective(aggregation)(log_probs, torch.full((2, 6), 0.5), pad(rows, 6))
    (loss / denominator).backward()
    assert loss.item() / denominator == pytest.approx(expected, abs=1e-6)
    assert metrics["loss"].item() == loss.item()
    assert metrics["kl/teacher"].item() == pytest.approx(0.2 - 0.6 + 0.5 + 0 - 2, abs=1e-6)
    assert metrics["entropy"].item() == 2.5
    lengths = (5, 5) if aggregation == "token-mean" else (6, 4)
    difference = [(0.2, -0.6, 0.5), (0.0, -2.0)]
    for row in (0, 1):
        expected_row = [value / lengths[row] for value in difference[row]]
        assert log_probs.grad[row, 1 : 1 + len(expected_row)].tolist() == pytest.approx(expected_row, abs=1e-6)


def test_self_distillation_without_a_teacher_is_refused():
    with pytest.raises(ValueError, match="teacher's log-probs"):
        distillation_objective("token-mean")(*_outputs(), _batch())


def test_an_unbiased_kl_gradient_is_chosen_by_the_config():
    log_probs, entropy = _outputs()
    silent = LossConfig(clip_low=1.0, kl_coefficient=0.5, kl_gradient="unbiased")
    micro = _batch(old_log_probs=OLD, ref_log_probs=START)
    loss, metrics = policy_objective(silent)(log_probs, entropy, micro)
    plain, _ = policy_objective(silent.model_copy(update={"kl_coefficient": 0.0}))(log_probs, entropy, micro)
    (loss - plain).backward()
    # 0.5 r (log p - log p_start), written out for the second sequence's tokens.
    assert log_probs.grad[1, 1:3].tolist() == pytest.approx([0.0, 0.5 * math.exp(-0.5) * -0.5], abs=1e-6)
    assert metrics["kl/ref"].item() / TOKENS == pytest.approx(0.084353, abs=1e-6)
