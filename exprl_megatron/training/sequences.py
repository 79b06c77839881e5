"""From graded groups to what the policy learns from."""

import torch

from exprl_megatron.algorithms.advantages import group_normalised, mean_centred
from exprl_megatron.algorithms.scores import group_scores
from exprl_megatron.config.stages import ExprlOutcomeStage, RlStage
from exprl_megatron.policy.batch import Sequence
from exprl_megatron.rollout.group import Group


def sequences_of(stage: RlStage, groups: list[Group]) -> list[Sequence]:
    """A sequence for each trace that has a score, its advantage on every token; abstentions are left out."""
    return [sequence for group in groups for sequence in _group_sequences(group, group_advantages(stage, group))]


def group_advantages(stage: RlStage, group: Group) -> torch.Tensor:
    """Advantages [K] (float64) by the stage's rule, statistics over valid traces only."""
    judgements = [member.judgement for member in group.members]
    overlong = [member.trace.overlong for member in group.members]
    if isinstance(stage, ExprlOutcomeStage):
        return group_normalised(*group_scores(judgements, overlong, stage.overlong))
    return mean_centred(*group_scores(judgements, overlong))


def _group_sequences(group: Group, advantages: torch.Tensor) -> list[Sequence]:
    return [
        Sequence(
            prompt_ids=member.trace.prompt_ids,
            response_ids=member.trace.token_ids,
            advantages=(advantage,) * len(member.trace.token_ids),
            sampler_log_probs=member.trace.log_probs,
        )
        for member, advantage in zip(group.members, advantages.tolist(), strict=True)
        if member.score is not None and member.trace.token_ids
    ]
