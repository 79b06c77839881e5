"""Metrics of each step: `step_metrics: [examples.step_metrics:FUNCTION]`."""

from collections.abc import Sequence
from statistics import fmean

from exprl_megatron.api import Group, Scored, StepInfo


def trusted_but_wrong(step: StepInfo, groups: Sequence[Group]) -> dict[str, float]:
    """Return the share of the traces that the judge gives at least 0.75 and the verifier finds wrong.

    It grows where the policy learns to please the judge.
    """
    samples = [sample for group in groups for sample in group.samples]
    hacked = [
        (sample.score or 0.0) >= 0.75 and isinstance(sample.verified, Scored) and sample.verified.value == 0.0
        for sample in samples
    ]
    return {
        "trusted_but_wrong": fmean(hacked),
        "longest_trace": max(len(s.trace.token_ids) for s in samples),
    }
