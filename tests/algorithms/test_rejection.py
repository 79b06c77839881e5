"""What a loss leaves out: the masks of DeepSeek-V3.2 and verl, and denominators with and without what is rejected."""

import math
from statistics import fmean

import pytest
import torch

from exprl_megatron.algorithms.aggregation import accepted_denominator, denominator_of
from exprl_megatron.algorithms.batch import TrainSample, pad
from exprl_megatron.algorithms.objective import policy_objective
from exprl_megatron.algorithms.rejection import acceptance_mask, off_policy_mask
from exprl_megatron.config.load import check_config
from exprl_megatron.config.losses import LossConfig, RejectionConfig
from exprl_megatron.errors import UserError
from exprl_megatron.training.statistics import update_statistics

SAMPLER = ((-1.0, -2.0, -0.5, -1.0), (-0.3, -0.7), (-1.5, -0.2, -0.9))
NEW = ((-0.6, -2.1, -0.9, 0.4), (-0.3, -1.2), (-2.5, -0.6, -1.0))
ADVANTAGES = (1.0, -0.5, -2.0)
START = ((-0.9, -2.0, -1.0, -0.5), (-0.3, -0.7), (-1.0, -0.3, -0.8))
MAX_NEW_TOKENS = 16
BOUNDS = {"low": 2 / 3, "high": 1.5}
TIS = {"kind": "truncated", "level": "token", "high": 2.0}


def tensor(rows):
    return torch.tensor([[*row, *[0.0] * (4 - len(row))] for row in rows], dtype=torch.float64)


MASK = tensor([[1.0] * len(row) for row in NEW])


def masks(config, advantages=None):
    advantages = tensor([[a] * 4 for a in ADVANTAGES]) if advantages is None else advantages
    kept = acceptance_mask(config, tensor(NEW), tensor(NEW), tensor(SAMPLER), advantages, MASK)
    return [row[: len(new)] for row, new in zip(kept.tolist(), NEW, strict=True)]


# Of TRL 1.16.0's GRPOTrainer.get_off_policy_mask, which gives a row for each sequence. The means are -0.325, 0.25, 0.5.
@pytest.mark.parametrize(("threshold", "kept"), [(0.2, (1, 0, 0)), (0.4, (1, 1, 0)), (0.6, (1, 1, 1))])
def test_the_off_policy_mask_is_that_of_trl(threshold, kept):
    assert masks(RejectionConfig(off_policy_threshold=threshold)) == [
        [float(k)] * len(new) for k, new in zip(kept, NEW, strict=True)
    ]


def test_a_token_with_an_advantage_above_zero_stays_in_a_distant_sequence():
    advantages = tensor([[1.0] * 4, [-0.5] * 2, [2.0, -2.0, 0.0]])
    assert masks(RejectionConfig(off_policy_threshold=0.2), advantages)[2] == [1.0, 0.0, 1.0]


def test_the_off_policy_mask_follows_the_policy_through_the_updates_of_a_step():
    sampler, advantages, ones = tensor([[-1.0, -1.0]])[:, :2], -torch.ones(1, 2), torch.ones(1, 2)
    for now, kept in ((-1.0, 1.0), (-1.5, 1.0), (-1.7, 0.0)):
        policy = torch.full((1, 2), now)
        assert off_policy_mask(policy, sampler, advantages, ones, 0.5).tolist() == [[kept] * 2]


# Of verl 0.9.1's compute_rollout_rejection_mask with the bounds 0.667 and 1.5: seq_mean_k1, token_k1.
@pytest.mark.parametrize(
    ("level", "kept"),
    [
        ("geometric", [[1, 1, 1, 1], [1, 1], [0, 0, 0]]),
        ("token", [[1, 1, 1, 0], [1, 0], [0, 1, 1]]),
        ("sequence", [[0, 0, 0, 0], [0, 0], [0, 0, 0]]),
    ],
)
def test_the_bounds_of_a_level_are_those_of_verl(level, kept):
    assert masks(RejectionConfig(level=level, **BOUNDS)) == kept


def batch(advantages=None, **given):
    rows = []
    for i, new in enumerate(NEW):
        chosen = advantages or [[a] * len(row) for a, row in zip(ADVANTAGES, NEW, strict=True)]
        values = {name: value[i] for name, value in given.items()}
        rows.append(TrainSample((1, 2), range(3, 3 + len(new)), chosen[i], rollout_log_probs=SAMPLER[i], **values))
    return rows


def minimized(loss, sequences, packing=((0, 1, 2),)):
    """(loss, metrics, gradient by token) as a step makes them: divided by what is counted, however it is packed."""
    whole = denominator_of(loss.aggregation, sequences, MAX_NEW_TOKENS)
    sums, leaves, total = {}, [], 0.0
    for rows in packing:
        log_probs = torch.full((len(rows), 8), -7.0)
        for row, index in enumerate(rows):
            log_probs[row, 1 : 1 + len(NEW[index])] = torch.tensor(NEW[index])
        leaves.append(log_probs.requires_grad_())
        summed, metrics = policy_objective(loss)(
            log_probs, torch.full_like(log_probs, 0.5).detach(), pad([sequences[index] for index in rows], 8)
        )
        total = total + summed / whole
        sums = {name: sums.get(name, 0.0) + value.item() for name, value in metrics.items()}
    total.backward()
    kept = accepted_denominator(loss.aggregation, sums, MAX_NEW_TOKENS, whole)
    gradients = {}
    for rows, leaf in zip(packing, leaves, strict=True):
        for row, index in enumerate(rows):
            gradients[index] = leaf.grad[row, 1 : 1 + len(NEW[index])] * whole / kept
    metrics = update_statistics(sums, sum(s.response_tokens for s in sequences), kept)
    return total.item() * whole / kept, metrics, torch.cat([gradients[i] for i in range(len(NEW))])


# Of verl 0.9.1's agg_loss on -A min(p / b, 2): its mask without the rejected tokens, or these as zeros in its mask.
VERL = [
    ("geometric", "token-mean", -0.710619471976092, -0.47374631465072803),
    ("geometric", "sequence-mean", -0.43255643717067915, -0.2883709581137861),
    ("geometric", "sequence-sum", -2.131858415928276, -1.421238943952184),
    ("geometric", "constant-length", -0.13324115099551725, -0.0888274339970115),
    ("token", "token-mean", 0.09722212773838812, 0.06481475182559208),
    ("token", "sequence-mean", 0.3509433557886488, 0.17778647759534313),
    ("token", "sequence-sum", 0.19444425547677616, 0.19444425547677616),
    ("token", "constant-length", 0.01215276596729851, 0.01215276596729851),
]


@pytest.mark.parametrize("packing", [((0, 1, 2),), ((2,), (1, 0))], ids=["together", "apart"])
@pytest.mark.parametrize("in_denominator", [True, False])
@pytest.mark.parametrize(("level", "aggregation", "left_out", "counted"), VERL)
def test_a_sequence_mask_with_token_weights_has_the_loss_of_verl(
    level, aggregation, left_out, counted, in_denominator, packing
):
    rejection = {"level": level, **BOUNDS, "in_denominator": in_denominator}
    loss = LossConfig(aggregation=aggregation, kl_coefficient=0, correction=TIS, rejection=rejection)
    found, metrics, gradient = minimized(loss, batch(), packing)
    expected = counted if in_denominator else left_out
    assert (found, metrics["loss"]) == (pytest.approx(expected, abs=1e-6), pytest.approx(expected, abs=1e-6))
    # The surrogate's gradient is its value where the ratio is 1: the sums of both agree.
    assert gradient.sum().item() == pytest.approx(expected, abs=1e-6)
    assert metrics["rejected"] == pytest.approx({"geometric": 3 / 9, "token": 3 / 9}[level])


def test_what_the_correction_masks_leaves_the_denominator_too():
    masked = {"kind": "masked", "level": "token", "low": 2 / 3, "high": 1.5}
    weights = [math.exp(n - b) for new, old in zip(NEW, SAMPLER, strict=True) for n, b in zip(new, old, strict=True)]
    advantages = [a for a, new in zip(ADVANTAGES, NEW, strict=True) for _ in new]
    values = [-a * w for a, w in zip(advantages, weights, strict=True) if 2 / 3 <= w <= 1.5]
    for in_denominator, count in ((True, len(weights)), (False, len(values))):
        loss = LossConfig(kl_coefficient=0, correction=masked, rejection={"in_denominator": in_denominator})
        assert minimized(loss, batch())[0] == pytest.approx(sum(values) / count, abs=1e-6)


@pytest.mark.parametrize("in_denominator", [True, False])
def test_kl_and_entropy_of_what_is_rejected_stay_with_it_in_the_denominator(in_denominator):
    """DeepSeek-V3.2's equation 9 has M before the surrogate alone; verl takes rejected tokens out of everything."""
    rejection = {"off_policy_threshold": 0.4, "in_denominator": in_denominator}
    loss = LossConfig(kl_coefficient=0.1, entropy_coefficient=0.01, rejection=rejection)
    losses = []
    for new, start, a in zip(NEW, START, ADVANTAGES, strict=True):
        kept = a != -2.0
        for n, s in zip(new, start, strict=True):
            k3 = math.exp(s - n) - (s - n) - 1
            if kept or in_denominator:
                losses.append((-a if kept else 0.0) + 0.1 * k3 - 0.01 * 0.5)
    assert minimized(loss, batch(ref_log_probs=START))[0] == pytest.approx(fmean(losses), abs=1e-6)


def test_an_update_of_which_nothing_is_kept_has_the_gradient_zero():
    rejection = {"level": "sequence", "low": 0.99, "high": 1.01, "in_denominator": False}
    found, metrics, gradient = minimized(LossConfig(kl_coefficient=0, rejection=rejection), batch())
    assert (found, metrics["rejected"], gradient.abs().max().item()) == (0.0, 1.0, 0.0)


def test_a_rejection_needs_the_sampler_s_log_probs():
    sequences = [TrainSample((1,), (2, 3), (1.0, 1.0))]
    objective = policy_objective(LossConfig(kl_coefficient=0, rejection={"off_policy_threshold": 0.5}))
    with pytest.raises(ValueError, match="has no log-probs of the sampler"):
        objective(torch.zeros(1, 4), torch.zeros(1, 4), pad(sequences, 4))


def checked(loss, policy=None):
    stage = {"kind": "sparse-rl", "name": "a", "steps": 1, "problems": {"source": "x"}, "loss": loss}
    return check_config({"directory": "d", "policy": {"model": "m"} | (policy or {}), "stages": [stage]}, "t")


@pytest.mark.parametrize(
    ("loss", "policy", "said"),
    [
        ({"rejection": {"in_denominator": False}}, {}, "in_denominator is false, but nothing is rejected"),
        (
            {"rejection": {"in_denominator": False, "level": "token"}},
            {"moe_aux_loss": 0.01},
            r"rescales the gradient of an update, and with it that of policy.moe_aux_loss \(0.01\)",
        ),
    ],
)
def test_a_rejection_that_does_nothing_or_too_much_is_refused(loss, policy, said):
    with pytest.raises(UserError, match=said):
        checked(loss, policy)


@pytest.mark.parametrize(
    "loss",
    [
        {"rejection": {"in_denominator": False, "off_policy_threshold": 0.5}},
        {"rejection": {"in_denominator": False}, "correction": {"kind": "masked"}},
        {"rejection": {"level": "geometric"}, "correction": {"kind": "truncated"}},
    ],
)
def test_rejections_and_weights_go_together(loss):
    checked(loss)
