"""Calibration metrics: how well scores of a judge separate right traces from wrong ones.

Scores are on the judge's scale 1..5. The metrics are those of the ExpRL paper's calibration (misplacement, AUROC).

Why neither scikit-learn nor scipy.stats: the first is not a dependency, and the import of the second takes 0.8 CPU
seconds in every trainer process, for a few lines on ranks.
"""

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from exprl_megatron.utils.intervals import Interval, boundary_margin

MIN_RIGHT_SCORE = 4
"""A score of 4 or 5 means that the judge considers the trace right."""
RESAMPLES = 2000
CONFIDENCE = 0.95
_WRONG_REFERENCE_SEED = 0xC0DE
SCORE_TOLERANCE = 1e-9
"""Scores that differ by less count as equal: a score may be a weighted sum with a rounding error."""


@dataclass(frozen=True)
class Misplacement:
    """Shares of the traces that the judge put on the wrong side."""

    false_negative: float
    """Right traces scored below 4; nan without a scored right trace."""
    false_positive: float
    """Wrong traces scored 4 or more; nan without a scored wrong trace."""

    @property
    def rate(self) -> float:
        """(FNR + FPR) / 2; a judge that ignores the trace has 0.5."""
        return (self.false_negative + self.false_positive) / 2


def misplacement(scores: Sequence[float | None], correct: Sequence[bool]) -> Misplacement:
    """Compute the misplacement from scores (None: abstained, not counted) and whether each trace is right."""
    values, right = _scored(scores, correct)
    passed = values >= MIN_RIGHT_SCORE - SCORE_TOLERANCE
    return Misplacement(_share(~passed[right]), _share(passed[~right]))


def auroc(scores: Sequence[float | None], correct: Sequence[bool]) -> float:
    """Compute the probability that a right trace has a higher score than a wrong one; ties count half.

    This is the Mann-Whitney statistic, from mid-ranks. It is nan where either side has no score (None: not counted).
    """
    values, right = _scored(scores, correct)
    positives, negatives = int(right.sum()), int((~right).sum())
    if not positives or not negatives:
        return float("nan")
    above = mid_ranks(values)[right].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Compute Spearman's rank correlation; nan for fewer than 3 pairs or where one side is constant."""
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return float("nan")
    return float(np.corrcoef(mid_ranks(x), mid_ranks(y))[0, 1])


def mid_ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the ranks of `values` [n], from 1, as float64 [n]; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def histogram(scores: Sequence[float]) -> tuple[int, int, int, int, int]:
    """Count the scores that are nearest to 1, 2, 3, 4 and 5."""
    nearest = np.floor(np.asarray(scores, dtype=float) + 0.5).astype(int)
    one, two, three, four, five = (int((nearest == score).sum()) for score in range(1, 6))
    return one, two, three, four, five


def agreement(repeats: Sequence[float]) -> float:
    """Compute the share of pairs of one trace's scores that are equal; nan for fewer than two scores."""
    pairs = list(combinations(repeats, 2))
    return _share([abs(a - b) <= SCORE_TOLERANCE for a, b in pairs])


def bootstrap_interval(
    clusters: Sequence[Hashable], statistic: Callable[[np.ndarray], float], seed: int = 0
) -> Interval | None:
    """Compute the percentile bootstrap interval over clusters (95 %, 2,000 resamples) of a share in [0, 1].

    A share of 0 or 1 is the same in every resample. A bound is therefore at least as far from 0 and 1 as the exact
    binomial bound of as many units as there are clusters.

    Args:
        clusters: the cluster of each item (the traces of one problem are not independent).
        statistic: computes the share from the indices of a resample's items, int64 [items]. Resamples where it is nan
            are left out.
        seed: seed of the resampling.

    Returns:
        The interval; None where no resample has a share.
    """
    members: dict[Hashable, list[int]] = {}
    for index, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(index)
    if not members:
        return None
    items = [np.array(indices) for indices in members.values()]
    draws = np.random.default_rng(seed).integers(len(items), size=(RESAMPLES, len(items)))
    values = np.array([statistic(np.concatenate([items[i] for i in draw])) for draw in draws])
    values = values[~np.isnan(values)]
    if not values.size:
        return None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    margin = boundary_margin(len(items), CONFIDENCE)
    return Interval(min(float(low), 1 - margin), max(float(high), margin))


def wrong_references(keys: Sequence[str]) -> dict[str, str]:
    """Map each problem to another one, whose reference it gets: the sorted keys are shuffled, each gets the next one.

    This is the rule of the released calibration (seed 0xC0DE).
    """
    order = sorted(keys)
    random.Random(_WRONG_REFERENCE_SEED).shuffle(order)
    return {key: order[(i + 1) % len(order)] for i, key in enumerate(order)}


def _scored(scores: Sequence[float | None], correct: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores that are not None, float64 [n], and whether their traces are right, bool [n]."""
    pairs = [(score, right) for score, right in zip(scores, correct, strict=True) if score is not None]
    return np.array([score for score, _ in pairs], dtype=float), np.array([right for _, right in pairs], dtype=bool)


def _share(hits: Sequence[bool]) -> float:
    return float(np.mean(hits)) if len(hits) else float("nan")
