"""The rewards of a group's traces, and DAPO's soft overlong punishment (arXiv 2503.14476, equation 13)."""

from collections.abc import Sequence
from typing import Literal

import torch

from exprl_megatron.algorithms.scores import group_scores, soft_overlong_punishment
from exprl_megatron.config.stages import RlStage
from exprl_megatron.rollout.group import GradedTrace, Group

JUDGE = "judge"
OverlongRule = Literal["zero", "score", "exclude"]


def group_rewards(group: Group, overlong: OverlongRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute rewards [K] (float64, 0 where there is none) and their validity [K] (bool); see group_scores.

    Of a reward with several terms every term must have a value. The rule `zero` applies only to the judge's score: the
    other terms of an overlong trace remain, so that a penalty is not lost with the score.
    """
    truncated = [sample.trace.overlong for sample in group.samples]
    scores, valid = group_scores([sample.judgement for sample in group.samples], truncated, overlong)
    for k, sample in enumerate(group.samples):
        if sample.terms:
            reward = _sum_of_terms(sample, zeroed=truncated[k] and overlong == "zero")
            counts = reward is not None and not (truncated[k] and overlong == "exclude")
            valid[k], scores[k] = counts, (reward or 0.0) if counts else 0.0
    return scores, valid


def _sum_of_terms(sample: GradedTrace, zeroed: bool) -> float | None:
    """Return the weighted sum of the terms; where `zeroed`, the judge's score counts as 0."""
    if sample.reward is None or not zeroed:
        return sample.reward
    return sum(term.weight * term.value for term in sample.terms if term.source != JUDGE and term.value is not None)


def overlong_penalties(stage: RlStage, samples: Sequence[GradedTrace]) -> torch.Tensor | None:
    """Return [K], float64, at most 0, to be added to the samples' scores; None where `stage` has no `soft_overlong`."""
    soft = getattr(stage, "soft_overlong", None)
    if soft is None:
        return None
    lengths = [len(sample.trace.token_ids) for sample in samples]
    return soft.penalty * soft_overlong_punishment(lengths, *soft.lengths(stage.sampling.max_new_tokens))
