"""pass@k: the unbiased estimate from n samples per problem, with an interval over problems; paired gains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from exprl_megatron.utils.intervals import difference_bounds, mean_bounds

GradedCounts = Mapping[str, Sequence[int]]
"""Problem -> [graded samples, right ones]."""


@dataclass(frozen=True)
class PassAtK:
    """An estimate, or a gain, and its confidence interval: shares in [0, 1], gains in [-1, 1]."""

    k: int
    mean: float
    low: float
    high: float
    problems: int
    """Number of problems in the estimate."""


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Compute the probability that at least one of `k` samples, drawn without replacement, is correct.

    It is 1 - C(samples - correct, k) / C(samples, k) (arXiv 2107.03374).

    Raises:
        ValueError: not 1 <= k <= samples and 0 <= correct <= samples.
    """
    if not (1 <= k <= samples and 0 <= correct <= samples):
        raise ValueError(f"pass@{k} cannot be computed from {correct} correct of {samples} samples")
    return 1 - comb(samples - correct, k) / comb(samples, k)


def estimate_pass_at_k(counts: Sequence[Sequence[int]], k: int, confidence: float = 0.95) -> PassAtK:
    """Estimate the mean pass@k over problems; `counts` has (graded samples, correct samples) of each problem.

    The interval (`intervals.mean_bounds` with one seed) shows how much another choice of problems would change the
    mean. A problem with fewer than `k` graded samples is left out.

    Raises:
        ValueError: no problem has `k` graded samples.
    """
    values = np.array([pass_at_k(samples, correct, k) for samples, correct in counts if samples >= k])
    if not values.size:
        raise ValueError(f"no problem has {k} graded samples, which pass@{k} needs")
    low, high = mean_bounds(values[None], confidence)
    return PassAtK(k, float(values.mean()), float(low), float(high), values.size)


def estimate_gain(before: GradedCounts, after: GradedCounts, k: int, confidence: float = 0.95) -> PassAtK | None:
    """Estimate the mean of pass@k `after` minus `before`, paired by problem.

    The interval (`intervals.difference_bounds` with one seed per side) shows how much another choice of problems would
    change the gain. None where no problem has `k` graded samples in both.
    """
    shared = [name for name in before if name in after and min(before[name][0], after[name][0]) >= k]
    if not shared:
        return None
    first, second = (
        np.array([[pass_at_k(samples, correct, k) for samples, correct in (counts[name] for name in shared)]])
        for counts in (before, after)
    )
    low, high = difference_bounds(second, first, confidence)
    return PassAtK(k, float(second.mean() - first.mean()), float(low), float(high), len(shared))
