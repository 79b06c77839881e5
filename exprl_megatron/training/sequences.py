"""From graded groups to what the policy learns from."""

from collections import defaultdict
from itertools import chain, pairwise

import numpy as np
import torch

from exprl_megatron.algorithms.advantages import estimator, group_normalised
from exprl_megatron.algorithms.batch import Sequence
from exprl_megatron.algorithms.process import SegmentedTrace, process_credits
from exprl_megatron.algorithms.scores import group_scores
from exprl_megatron.config.stages import ExprlOutcomeStage, ExprlProcessStage, SparseRlStage
from exprl_megatron.judging.judgement import Scored
from exprl_megatron.rollout.group import GradedTrace, Group
from exprl_megatron.training.punishment import length_punishments

GradedStage = ExprlOutcomeStage | ExprlProcessStage | SparseRlStage
"""Stages that learn from grades; self-distillation has a teacher instead."""

TokenAdvantages = np.ndarray | None
"""[tokens], float32: an advantage for each token of a trace; None: the trace is out of the loss."""


def update_sequences(stage: GradedStage, groups: list[Group], version: str | None = None) -> list[list[Sequence]]:
    """The sequences of each of the step's `updates_per_step` optimizer steps, the groups in their order.

    Estimators that look at a batch look at all groups of the step. An update whose traces are all out of the loss is
    an empty list. `version` is that of the weights that learn, where some traces may be of older ones.
    """
    of_groups = [
        [_sequence(member, row, version) for member, row in zip(group.members, rows, strict=True) if row is not None]
        for group, rows in zip(groups, token_advantages(stage, groups), strict=True)
    ]
    bounds = [i * len(groups) // stage.updates_per_step for i in range(stage.updates_per_step + 1)]
    parts = [chain.from_iterable(of_groups[first:last]) for first, last in pairwise(bounds)]
    return [[sequence for sequence in part if sequence.response_tokens] for part in parts]


def token_advantages(stage: GradedStage, groups: list[Group]) -> list[list[TokenAdvantages]]:
    """By the stage's rules, for every member of every group; abstentions are out of the loss.

    All groups have as many members. Raises ValueError where a trace was not judged as the stage wants it.
    """
    if not groups:
        return []
    if not isinstance(stage, ExprlProcessStage):
        return _trace_advantages(stage, groups)
    routed: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        routed[stage.route(group.domain).estimator].append(index)
    found: dict[int, list[TokenAdvantages]] = {}
    for name, indices in routed.items():
        chosen = [groups[index] for index in indices]
        rows = _routed_outcome(stage, chosen) if name == "outcome" else _segment_advantages(stage, name, chosen)
        found |= zip(indices, rows, strict=True)
    return [found[index] for index in range(len(groups))]


def _trace_advantages(stage: ExprlOutcomeStage | SparseRlStage, groups: list[Group]) -> list[list[TokenAdvantages]]:
    scores, valid = _scores(groups, stage.overlong)
    if stage.soft_overlong is not None:
        punishments = torch.stack([length_punishments(stage, group.members) for group in groups])
        scores = torch.where(valid, scores + punishments, scores)
    counted = valid
    if isinstance(stage, ExprlOutcomeStage) and stage.variant == "code":
        # The released code leaves an abstention's reward 0 in mean and std.
        counted = valid | ~torch.tensor([[isinstance(m.judgement, Scored) for m in g.members] for g in groups])
    return _spread(groups, estimator(stage.advantage)(scores, counted), valid)


def _routed_outcome(stage: ExprlProcessStage, groups: list[Group]) -> list[list[TokenAdvantages]]:
    """Traces judged whole among process rewards. An overlong one that is not left out has the score 0.

    The released code puts the bare score on the last token; the paper does not go into it.
    """
    scores, valid = _scores(groups, "exclude" if stage.overlong == "exclude" else "zero")
    if stage.variant != "code":
        return _spread(groups, group_normalised(scores, valid), valid)
    return [
        [
            _on_last_token(score, len(member.trace.token_ids)) if counts else None
            for member, score, counts in zip(group.members, of_group, of_valid, strict=True)
        ]
        for group, of_group, of_valid in zip(groups, scores.tolist(), valid.tolist(), strict=True)
    ]


def _segment_advantages(stage: ExprlProcessStage, name: str, groups: list[Group]) -> list[list[TokenAdvantages]]:
    traces = [[_segmented(member) for member in group.members] for group in groups]
    credits = process_credits(traces, name, stage.variant, stage.overlong, stage.sampling.max_new_tokens)
    return [
        [
            np.repeat(np.float32(credit.advantages), trace.lengths) if credit.in_loss else None
            for credit, trace in zip(of_group, group, strict=True)
        ]
        for of_group, group in zip(credits, traces, strict=True)
    ]


def _segmented(member: GradedTrace) -> SegmentedTrace:
    if not member.segments:
        raise ValueError(f"sample {member.trace.sample} of problem {member.trace.problem_id} has no judged segments")
    judgements = [segment.judgement for segment in member.segments]
    return SegmentedTrace(
        scores=tuple(judgement.value if isinstance(judgement, Scored) else None for judgement in judgements),
        lengths=tuple(segment.end - segment.start for segment in member.segments),
        overlong=member.trace.overlong,
    )


def _scores(groups: list[Group], overlong: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and validity [G, K] of traces judged whole."""
    pairs = [
        group_scores([m.judgement for m in group.members], [m.trace.overlong for m in group.members], overlong)
        for group in groups
    ]
    return torch.stack([scores for scores, _ in pairs]), torch.stack([valid for _, valid in pairs])


def _spread(groups: list[Group], advantages: torch.Tensor, in_loss: torch.Tensor) -> list[list[TokenAdvantages]]:
    """Advantages [G, K] on every token of their traces."""
    return [
        [
            np.broadcast_to(np.float32(advantage), len(member.trace.token_ids)) if counts else None
            for member, advantage, counts in zip(group.members, of_group, of_loss, strict=True)
        ]
        for group, of_group, of_loss in zip(groups, advantages.tolist(), in_loss.tolist(), strict=True)
    ]


def _on_last_token(score: float, tokens: int) -> np.ndarray:
    advantages = np.zeros(tokens, dtype=np.float32)
    advantages[-1:] = score
    return advantages


def _sequence(member: GradedTrace, advantages: np.ndarray, version: str | None) -> Sequence:
    trace = member.trace
    fresh = None
    if version is not None:
        spans = [(v == version, end - start) for v, start, end in trace.weight_versions]
        fresh = np.repeat([is_current for is_current, _ in spans], [tokens for _, tokens in spans])
    return Sequence(trace.prompt_ids, trace.token_ids, advantages, sampler_log_probs=trace.log_probs, fresh=fresh)
