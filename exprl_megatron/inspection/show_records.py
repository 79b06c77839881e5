"""Groups of the rollout log as JSON types."""

from dataclasses import asdict

import numpy as np

from exprl_megatron.inspection.rollout_steps import InspectedGroup, TokenAdvantages, span_advantage
from exprl_megatron.inspection.selection import SelectedGroup
from exprl_megatron.judging.judgement import judgement_to_dict
from exprl_megatron.rollout.group import GradedTrace


def group_to_dict(selected: SelectedGroup, tokens: bool = False) -> dict:
    """Return {place, group, problem_id, domain, traces: [...]}; docs/show.md describes them.

    With `tokens` each trace has its token ids and their log-probs.
    """
    inspected = selected.inspected
    advantages = inspected.advantages or (None,) * len(inspected.group.samples)
    return {
        "place": inspected.place,
        "group": inspected.number,
        "problem_id": inspected.group.problem_id,
        "domain": inspected.group.domain,
        "traces": [
            _trace_record(inspected.group.samples[place], advantages[place])
            | _gap_record(inspected, place)
            | (_token_record(inspected, place) if tokens else {})
            for place in selected.places
        ],
    }


def _gap_record(inspected: InspectedGroup, place: int) -> dict:
    gap = inspected.gap(place)
    if gap is None or not len(gap):
        return {"log_prob_gap": None}
    distances = np.abs(gap)
    return {"log_prob_gap": {"mean": float(distances.mean()), "max": float(distances.max())}}


def _token_record(inspected: InspectedGroup, place: int) -> dict:
    trace = inspected.group.samples[place].trace
    trainer = None if inspected.trainer_log_probs is None else inspected.trainer_log_probs[place]
    return {
        "token_ids": trace.token_ids.tolist(),
        "log_probs": trace.log_probs.tolist(),
        "trainer_log_probs": None if trainer is None else trainer.tolist(),
    }


def _trace_record(sample: GradedTrace, advantages: TokenAdvantages) -> dict:
    trace = sample.trace
    return {
        "sample": trace.sample,
        "judgement": judgement_to_dict(sample.judgement),
        "verified": None if sample.verified is None else judgement_to_dict(sample.verified),
        "reward": sample.reward,
        "terms": [asdict(term) for term in sample.terms],
        "advantage": None if sample.segments else span_advantage(advantages, 0, len(trace.token_ids)),
        "segments": [
            {
                "start": segment.start,
                "end": segment.end,
                "judgement": judgement_to_dict(segment.judgement),
                "advantage": span_advantage(advantages, segment.start, segment.end),
            }
            for segment in sample.segments
        ],
        "tokens": len(trace.token_ids),
        "finish_reason": trace.finish_reason,
        "weight_versions": [list(span) for span in trace.weight_versions],
        "text": trace.text,
    }
