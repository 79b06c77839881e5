"""Builds training samples with advantages from graded groups."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Literal

import numpy as np
import torch

from exprl_megatron.algorithms.advantages import advantage_fn, group_normalized
from exprl_megatron.algorithms.batch import TrainSample
from exprl_megatron.algorithms.process import SegmentedTrace, SegmentEstimator, process_credits
from exprl_megatron.config.stages import ExprlOutcomeStage, ExprlProcessStage, SparseRlStage
from exprl_megatron.errors import UserError
from exprl_megatron.judging.judgement import Scored
from exprl_megatron.rollout.group import GradedTrace, Group
from exprl_megatron.training.sample_rewards import OverlongRule, group_rewards, overlong_penalties

GradedStage = ExprlOutcomeStage | ExprlProcessStage | SparseRlStage
"""Stages that learn from scores; self-distillation has a teacher instead."""

TokenAdvantages = np.ndarray | None
"""[tokens], float32: the advantage of each token of a trace; None: the trace is excluded from the loss."""


def update_samples(
    stage: GradedStage,
    groups: list[Group],
    version: str | None = None,
    advantages: Sequence[Sequence[TokenAdvantages]] | None = None,
) -> list[list[TrainSample]]:
    """Build the training samples of each of the step's `updates_per_step` updates, in the order of the groups.

    Batch estimators take their statistics over all groups of the step. An update whose traces are all out of the loss
    is an empty list. `version` is the version of the weights that learn, where some traces may come from older ones.
    `advantages` of each trace of each group take the place of `token_advantages`.
    """
    of_all = token_advantages(stage, groups) if advantages is None else advantages
    of_groups = [
        [
            _train_sample(number, sample, row, version)
            for sample, row in zip(group.samples, rows, strict=True)
            if row is not None
        ]
        for number, (group, rows) in enumerate(zip(groups, of_all, strict=True))
    ]
    bounds = [i * len(groups) // stage.updates_per_step for i in range(stage.updates_per_step + 1)]
    parts = [chain.from_iterable(of_groups[first:last]) for first, last in pairwise(bounds)]
    return [[sample for sample in part if sample.response_tokens] for part in parts]


def token_advantages(stage: GradedStage, groups: list[Group]) -> list[list[TokenAdvantages]]:
    """Compute the advantages of every sample of every group; abstentions are excluded from the loss.

    All groups have the same size.

    Raises:
        ValueError: a trace was not judged with the stage's granularity.
        UserError: a trace was graded with other reward terms than the stage's.
    """
    if not groups:
        return []
    _check_terms(stage, groups)
    if not isinstance(stage, ExprlProcessStage):
        return _trace_advantages(stage, groups)
    routed: dict[SegmentEstimator | Literal["outcome"], list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        routed[stage.route(group.domain).estimator].append(index)
    found: dict[int, list[TokenAdvantages]] = {}
    for name, indices in routed.items():
        chosen = [groups[index] for index in indices]
        rows = _routed_outcome(stage, chosen) if name == "outcome" else _segment_advantages(stage, name, chosen)
        found |= zip(indices, rows, strict=True)
    return [found[index] for index in range(len(groups))]


def _check_terms(stage: GradedStage, groups: list[Group]) -> None:
    """Raise UserError where the traces were graded for another reward than that of `stage`."""
    terms = () if isinstance(stage, ExprlProcessStage) else stage.reward
    wanted = [(term.shown_name, term.weight) for term in terms]
    found = next(
        (pairs for g in groups for m in g.samples if (pairs := [(t.name, t.weight) for t in m.terms]) != wanted), None
    )
    if found is not None:
        raise UserError(
            f"The traces of stage {stage.name} were graded with the reward terms {_listed(found)}, but its config has "
            f"{_listed(wanted)}; set reward of the stage to what they were graded with."
        )


def _listed(terms: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{name} x {weight:g}" for name, weight in terms) or "none"


def _trace_advantages(stage: ExprlOutcomeStage | SparseRlStage, groups: list[Group]) -> list[list[TokenAdvantages]]:
    scores, valid = _scores(groups, stage.overlong)
    penalties = [each for group in groups if (each := overlong_penalties(stage, group.samples)) is not None]
    if penalties:
        scores = torch.where(valid, scores + torch.stack(penalties), scores)
    counted = valid
    if isinstance(stage, ExprlOutcomeStage) and stage.variant == "code":
        # In the released code an abstention's reward 0 is part of mean and std.
        counted = valid | ~torch.tensor([[isinstance(m.judgement, Scored) for m in g.samples] for g in groups])
    return _per_token(groups, advantage_fn(stage.advantage)(scores, counted), valid)


def _routed_outcome(stage: ExprlProcessStage, groups: list[Group]) -> list[list[TokenAdvantages]]:
    """Compute the advantages of traces judged as a whole in a process stage; overlong traces that count have score 0.

    The released code puts the score itself on the last token; the paper does not define this case.
    """
    scores, valid = _scores(groups, "exclude" if stage.overlong == "exclude" else "zero")
    if stage.variant != "code":
        return _per_token(groups, group_normalized(scores, valid), valid)
    return [
        [
            _on_last_token(score, len(sample.trace.token_ids)) if counts else None
            for sample, score, counts in zip(group.samples, of_group, of_valid, strict=True)
        ]
        for group, of_group, of_valid in zip(groups, scores.tolist(), valid.tolist(), strict=True)
    ]


def _segment_advantages(
    stage: ExprlProcessStage, name: SegmentEstimator, groups: list[Group]
) -> list[list[TokenAdvantages]]:
    traces = [[_segmented(sample) for sample in group.samples] for group in groups]
    credits = process_credits(traces, name, stage.variant, stage.overlong, stage.sampling.max_new_tokens)
    return [
        [
            np.repeat(np.asarray(credit.advantages, np.float32), trace.lengths) if credit.in_loss else None
            for credit, trace in zip(of_group, group, strict=True)
        ]
        for of_group, group in zip(credits, traces, strict=True)
    ]


def _segmented(sample: GradedTrace) -> SegmentedTrace:
    if not sample.segments:
        raise ValueError(f"sample {sample.trace.sample} of problem {sample.trace.problem_id} has no judged segments")
    judgements = [segment.judgement for segment in sample.segments]
    return SegmentedTrace(
        scores=tuple(judgement.value if isinstance(judgement, Scored) else None for judgement in judgements),
        lengths=tuple(segment.end - segment.start for segment in sample.segments),
        overlong=sample.trace.overlong,
    )


def _scores(groups: list[Group], overlong: OverlongRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute rewards and validity [G, K] of traces judged whole."""
    pairs = [group_rewards(group, overlong) for group in groups]
    return torch.stack([scores for scores, _ in pairs]), torch.stack([valid for _, valid in pairs])


def _per_token(groups: list[Group], advantages: torch.Tensor, in_loss: torch.Tensor) -> list[list[TokenAdvantages]]:
    """Repeat advantages [G, K] over the tokens of their traces."""
    return [
        [
            np.broadcast_to(np.float32(advantage), len(sample.trace.token_ids)) if counts else None
            for sample, advantage, counts in zip(group.samples, of_group, of_loss, strict=True)
        ]
        for group, of_group, of_loss in zip(groups, advantages.tolist(), in_loss.tolist(), strict=True)
    ]


def _on_last_token(score: float, tokens: int) -> np.ndarray:
    advantages = np.zeros(tokens, dtype=np.float32)
    advantages[-1:] = score
    return advantages


def _train_sample(group: int, sample: GradedTrace, advantages: np.ndarray, version: str | None) -> TrainSample:
    trace = sample.trace
    on_policy_mask = None
    if version is not None:
        spans = [(v == version, end - start) for v, start, end in trace.weight_versions]
        on_policy_mask = np.repeat([is_current for is_current, _ in spans], [tokens for _, tokens in spans])
    return TrainSample(
        trace.prompt_ids,
        trace.token_ids,
        advantages,
        rollout_log_probs=trace.log_probs,
        on_policy_mask=on_policy_mask,
        routed_experts=trace.routed_experts,
        place=(group, trace.sample),
    )
