"""What the scores of a step say about its judge: histogram, agreement with the verifier, abstentions, lengths."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from exprl_megatron.inspection.rollout_steps import InspectedGroup
from exprl_megatron.judging.judgement import REASON, Abstained, Scored
from exprl_megatron.rollout.group import GradedTrace

BINS = 10
"""Of scores in [0, 1]; the last one has 1 itself too."""
LENGTH_BINS = 12
_DISAGREES = 0.5
"""Judge and verifier disagree where their scores differ by more."""


def judge_figures(groups: Sequence[InspectedGroup], most_tokens: int) -> dict[str, Any]:
    """Return the figures of all traces of one step; lengths are in LENGTH_BINS equal bins up to `most_tokens`.

    A reason that is no short word, which a run of an earlier version may have from a verifier of its own, is `other`.
    """
    samples = [sample for inspected in groups for sample in inspected.group.samples]
    units = [unit for sample in samples for unit in sample.judgements]
    scores = np.array([unit.value for unit in units if isinstance(unit, Scored)])
    reasons = Counter(reason_word(unit.reason) for unit in units if isinstance(unit, Abstained))
    return {
        "units": len(units),
        "scores": np.histogram(scores, BINS, (0, 1))[0].tolist(),
        "abstained": dict(sorted(reasons.items())),
        "lengths": _lengths(samples, most_tokens),
        "agreement": _agreement(samples),
    }


def reason_word(reason: str) -> str:
    """Return the reason of an abstention where it is a short word, else `other`."""
    return reason if REASON.fullmatch(reason) else "other"


def _lengths(samples: Sequence[GradedTrace], most_tokens: int) -> list[list[int]]:
    """Return the counts of traces with a score, [LENGTH_BINS][BINS]."""
    pairs = [(len(sample.trace.token_ids), sample.score) for sample in samples if sample.score is not None]
    tokens, scores = np.array(pairs, np.float64).reshape(-1, 2).T
    counts, _, _ = np.histogram2d(tokens, scores, (LENGTH_BINS, BINS), ((0, most_tokens), (0, 1)))
    return counts.astype(int).tolist()


def _agreement(samples: Sequence[GradedTrace]) -> dict[str, Any] | None:
    """Return {compared, disagree, right, wrong}: the last two are the judge's mean scores of right and of wrong
    answers.

    None where no trace has both a judge's score and a verifier's.
    """
    pairs = [
        (sample.score, sample.verified.value)
        for sample in samples
        if sample.score is not None and isinstance(sample.verified, Scored)
    ]
    if not pairs:
        return None
    score, verified = np.array(pairs).T
    found = {"right": score[verified >= 0.5], "wrong": score[verified < 0.5]}
    return {
        "compared": len(pairs),
        "disagree": int((np.abs(score - verified) > _DISAGREES).sum()),
        **{name: round(float(of.mean()), 4) if len(of) else None for name, of in found.items()},
    }
