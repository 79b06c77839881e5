"""Algorithms by name: the stages that they stand for, whose objectives are those of the papers, written out."""

import math
from statistics import mean, stdev

import pytest
import torch

from exprl_megatron.algorithms.advantages import advantage_fn
from exprl_megatron.algorithms.aggregation import denominator_of
from exprl_megatron.algorithms.batch import TrainSample, pad
from exprl_megatron.algorithms.objective import policy_objective
from exprl_megatron.config.algorithms import ALGORITHMS
from exprl_megatron.config.load import check_config
from exprl_megatron.errors import UserError

KINDS = ("sparse-rl", "exprl-outcome")
OLD = ((-1.0, -2.0, -0.5, -1.0), (-0.3, -0.7))
NEW = ((-0.6, -2.1, -0.9, 0.4), (-0.3, -1.2))
START = ((-0.9, -2.0, -1.0, -0.5), (-0.3, -0.7))
ADVANTAGES = (1.5, -0.5)
LENGTH = 8
"""max_new_tokens."""
SCORES = ((1.0, 0.0, 0.0, 1.0), (1.0, 0.0, 0.5, 0.0))


def stage(settings, kind="sparse-rl"):
    judge = {"judge": {"model": "j"}} if kind == "exprl-outcome" else {}
    shared = {"kind": kind, "name": "a", "steps": 1, "problems": {"source": "x"}}
    return check_config(
        {"directory": "d", "policy": {"model": "m"}, "stages": [shared | settings], **judge}, "t"
    ).stages[0]


def clip(ratio, low, high):
    return min(max(ratio, low), high)


def ppo(low, high):
    """PPO's clipped objective, negative: (ratio, log-prob, advantage) -> loss of a token."""
    return lambda ratio, log_prob, a: -min(ratio * a, clip(ratio, 1 - low, 1 + high) * a)


def cispo(ratio, log_prob, a):
    return -min(ratio, 1.28) * a * log_prob


def k3(log_prob, start):
    return math.exp(start - log_prob) - (start - log_prob) - 1


def sequence_mean(losses):
    return mean(mean(of_sequence) for of_sequence in losses)


def token_mean(losses):
    return mean(loss for of_sequence in losses for loss in of_sequence)


def sequence_sum(losses):
    return mean(sum(of_sequence) for of_sequence in losses)


def constant_length(losses):
    return mean(sum(of_sequence) / LENGTH for of_sequence in losses)


# Loss of a token, aggregation, KL coefficient, whether the ratio is the sequence's geometric mean.
PAPERS = {
    "grpo": (ppo(0.2, 0.2), sequence_mean, 0.04, False),
    "dr_grpo": (ppo(0.2, 0.2), constant_length, 0, False),
    "rloo": (ppo(0.2, 0.2), sequence_sum, 0, False),
    "dapo": (ppo(0.2, 0.28), token_mean, 0, False),
    "gspo": (ppo(3e-4, 4e-4), sequence_mean, 0, True),
    "cispo": (cispo, token_mean, 0, False),
    "reinforce++": (ppo(0.2, 0.2), token_mean, 1e-3, False),
    "reinforce++-baseline": (ppo(0.2, 0.2), token_mean, 1e-3, False),
}


def papers_loss(name):
    of_token, aggregate, kl, whole = PAPERS[name]
    losses = []
    for new, old, start, a in zip(NEW, OLD, START, ADVANTAGES, strict=True):
        gaps = [n - o for n, o in zip(new, old, strict=True)]
        ratios = [math.exp(mean(gaps) if whole else gap) for gap in gaps]
        losses.append([of_token(r, n, a) + kl * k3(n, s) for r, n, s in zip(ratios, new, start, strict=True)])
    return aggregate(losses)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_loss_of_a_name_is_its_papers(name, kind):
    sequences = [
        TrainSample((1, 2), tuple(range(3, 3 + len(old))), (a,) * len(old), old_log_probs=old, ref_log_probs=start)
        for old, start, a in zip(OLD, START, ADVANTAGES, strict=True)
    ]
    log_probs = torch.full((2, 8), -7.0)
    for row, new in enumerate(NEW):
        log_probs[row, 1 : 1 + len(new)] = torch.tensor(new)
    loss = stage({"algorithm": name}, kind).loss
    summed, _ = policy_objective(loss)(log_probs, torch.full((2, 8), 0.5), pad(sequences, 8))
    divisor = denominator_of(loss.aggregation, sequences, LENGTH)
    assert summed.item() / divisor == pytest.approx(papers_loss(name), rel=1e-5)


def papers_advantages(name):
    """REINFORCE++ normalizes over the batch (a trace counts once); the others within a group."""
    batch = [score for group in SCORES for score in group]
    if name == "reinforce++":
        return [[(s - mean(batch)) / stdev(batch) for s in group] for group in SCORES]
    centered = [[s - mean(group) for s in group] for group in SCORES]
    if name == "reinforce++-baseline":
        spread = stdev([a for group in centered for a in group])
        return [[a / spread for a in group] for group in centered]
    if name == "dr_grpo":
        return centered
    if name == "rloo":
        return [[s - (sum(group) - s) / 3 for s in group] for group in SCORES]
    return [[a / stdev(group) for a in of_group] for group, of_group in zip(SCORES, centered, strict=True)]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_advantages_of_a_name_are_its_papers(name):
    scores = torch.tensor(SCORES, dtype=torch.float64)
    found = advantage_fn(stage({"algorithm": name}).advantage)(scores, torch.ones_like(scores, dtype=torch.bool))
    expected = papers_advantages(name)
    assert [pytest.approx(row, rel=1e-4) for row in expected] == found.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_dapo_punishes_long_traces_and_leaves_out_groups_without_a_difference(kind):
    found = stage({"algorithm": "dapo", "sampling": {"max_new_tokens": 1024}}, kind)
    assert (found.overlong, found.soft_overlong.penalty) == ("score", 0.5)
    # The paper's 4,096 of 20,480 tokens.
    assert found.soft_overlong.lengths(20480) == (20480, 4096)
    assert getattr(found, "dynamic_sampling", 4) == 4


def test_a_setting_of_the_stage_takes_precedence():
    found = stage({"algorithm": "dapo", "dynamic_sampling": None, "loss": {"clip_high": 0.3}})
    assert (found.loss.clip_high, found.loss.clip_low, found.dynamic_sampling) == (0.3, 0.2, None)


def test_the_resolved_config_has_the_settings_and_stays_the_same_stage():
    found = stage({"algorithm": "cispo"})
    again = found.model_dump(mode="json")
    assert again["loss"]["surrogate"] == "clipped-weight" and "algorithm" not in again
    assert stage(again) == found


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"algorithm": "grop"}, r"stages.0.algorithm is 'grop'; set it to one of grpo, dr_grpo, rloo, dapo"),
        ({"algorithm": ["grpo"]}, "set it to one of"),
        ({"algorithm": "grpo", "kind": "exprl-process"}, "only stages of kind sparse-rl or exprl-outcome have one"),
    ],
)
def test_an_algorithm_that_is_none_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        stage(settings)


def test_an_algorithm_that_would_change_nothing_is_refused():
    with pytest.raises(UserError, match="sets all that this would set"):
        stage(stage({"algorithm": "grpo"}).model_dump(mode="json") | {"algorithm": "gspo"})
