"""What a step's traces and updates look like, as named numbers for the logs."""

import statistics
from collections import Counter

from exprl_megatron.judging.judgement import Abstained
from exprl_megatron.rollout.group import Group


def group_statistics(groups: list[Group]) -> dict[str, float]:
    """Scores, lengths, abstentions; shares are of all traces or of all groups."""
    members = [member for group in groups for member in group.members]
    scores = [member.score for member in members if member.score is not None]
    lengths = [len(member.trace.token_ids) for member in members]
    reasons = Counter(m.judgement.reason for m in members if isinstance(m.judgement, Abstained))
    found = {
        "reward/mean": statistics.fmean(scores) if scores else 0.0,
        "reward/mixed_groups": statistics.fmean(len(set(group.scores)) > 1 for group in groups),
        "reward/groups_with_success": statistics.fmean(max(group.scores, default=0.0) == 1.0 for group in groups),
        "reward/abstained": 1 - len(scores) / len(members),
        "length/mean": statistics.fmean(lengths),
        "length/max": max(lengths),
        "length/overlong": statistics.fmean(member.trace.overlong for member in members),
    }
    return found | {f"abstained/{reason}": count / len(members) for reason, count in sorted(reasons.items())}


def update_statistics(sums: dict[str, float], tokens: int, denominator: float | None = None) -> dict[str, float]:
    """Sums over response tokens become means; names that end in `/max` already are maxima.

    `loss` and `loss/...` are divided by the update's `denominator` (see algorithms/aggregation.py); None: by tokens.
    """
    divisors = {"loss": tokens if denominator is None else denominator}
    means = {
        name: value if name.endswith("/max") else value / divisors.get(name.split("/")[0], tokens)
        for name, value in sums.items()
    }
    return means | {"tokens": tokens}
