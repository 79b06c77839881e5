"""How well a judge's scores tell right traces from wrong ones: the arithmetic of calibration, without a judge.

Scores are on the judge's scale 1..5. The measures are those of the ExpRL paper's calibration (misplacement, AUROC).
"""

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from exprl_megatron.utils.intervals import Interval, boundary_margin

RIGHT_FROM = 4
"""A score of 4 or 5 means that the judge takes the trace for right."""
RESAMPLES = 2000
CONFIDENCE = 0.95
_WRONG_REFERENCE_SEED = 0xC0DE
ROUNDING = 1e-9
"""Scores that differ by less are equal: a score may be a weighted sum, and 4 then miss itself by a rounding."""


@dataclass(frozen=True)
class Misplacement:
    """Shares of the traces that the judge put on the wrong side."""

    false_negative: float
    """Right traces scored below 4; nan without a scored right trace."""
    false_positive: float
    """Wrong traces scored 4 or more; nan without a scored wrong trace."""

    @property
    def rate(self) -> float:
        """(FNR + FPR) / 2: 0.5 is what a judge gets that does not look."""
        return (self.false_negative + self.false_positive) / 2


def misplacement(scores: Sequence[float | None], correct: Sequence[bool]) -> Misplacement:
    """From scores (None: abstained, not counted) and whether each trace is right in truth."""
    values, right = _scored(scores, correct)
    passed = values >= RIGHT_FROM - ROUNDING
    return Misplacement(_share(~passed[right]), _share(passed[~right]))


def auroc(scores: Sequence[float | None], correct: Sequence[bool]) -> float:
    """Chance that a right trace has a higher score than a wrong one, ties counted half (None: not counted).

    The Mann-Whitney statistic from mid-ranks; nan where either side has no score.
    """
    values, right = _scored(scores, correct)
    positives, negatives = int(right.sum()), int((~right).sum())
    if not positives or not negatives:
        return float("nan")
    above = mid_ranks(values)[right].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: Pearson's correlation of mid-ranks; nan for fewer than 3 pairs or where one side is constant."""
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return float("nan")
    return float(np.corrcoef(mid_ranks(x), mid_ranks(y))[0, 1])


def mid_ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Ranks from 1, float64 [n]; equal values share the mean of theirs."""
    _, place, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def histogram(scores: Sequence[float]) -> tuple[int, int, int, int, int]:
    """How many scores are nearest to 1, 2, 3, 4 and 5."""
    nearest = np.floor(np.asarray(scores, dtype=float) + 0.5).astype(int)
    one, two, three, four, five = (int((nearest == score).sum()) for score in range(1, 6))
    return one, two, three, four, five


def agreement(repeats: Sequence[float]) -> float:
    """Share of pairs of one trace's scores that are equal; nan for fewer than two scores."""
    pairs = list(combinations(repeats, 2))
    return _share([abs(a - b) <= ROUNDING for a, b in pairs])


def bootstrap_interval(
    clusters: Sequence[Hashable], statistic: Callable[[np.ndarray], float], seed: int = 0
) -> Interval | None:
    """The percentile bootstrap over clusters (95 %, 2,000 resamples, seeded) of `statistic`, a share in [0, 1].

    `clusters` names each item's cluster (the traces of one problem are not independent); `statistic` gets
    the indices of a resample's items, int64. Resamples on which it is nan are left out; None where all are. A share
    of 0 or 1 is the same in every resample; a bound next to 0 or 1 is therefore nowhere closer to it than the exact
    binomial bound of as many units as there are clusters.
    """
    members: dict[Hashable, list[int]] = {}
    for index, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(index)
    if not members:
        return None
    items = [np.array(indices) for indices in members.values()]
    draws = np.random.default_rng(seed).integers(len(items), size=(RESAMPLES, len(items)))
    values = np.array([statistic(np.concatenate([items[i] for i in drawn])) for drawn in draws])
    values = values[~np.isnan(values)]
    if not values.size:
        return None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    margin = boundary_margin(len(items), CONFIDENCE)
    return Interval(min(float(low), 1 - margin), max(float(high), margin))


def wrong_references(keys: Sequence[str]) -> dict[str, str]:
    """For each problem another one whose reference it is given: the sorted keys shuffled, each takes the next one's.

    The released calibration's rule (seed 0xC0DE).
    """
    order = sorted(keys)
    random.Random(_WRONG_REFERENCE_SEED).shuffle(order)
    return {key: order[(i + 1) % len(order)] for i, key in enumerate(order)}


def _scored(scores: Sequence[float | None], correct: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """The scores that there are, float64 [n], and whether their traces are right, bool [n]."""
    pairs = [(score, right) for score, right in zip(scores, correct, strict=True) if score is not None]
    return np.array([score for score, _ in pairs], dtype=float), np.array([right for _, right in pairs], dtype=bool)


def _share(hits: Sequence[bool]) -> float:
    return float(np.mean(hits)) if len(hits) else float("nan")
