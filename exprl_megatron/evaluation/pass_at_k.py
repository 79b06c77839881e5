"""pass@k: the unbiased estimate from n samples a problem, with a bootstrap interval over problems."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class PassAtK:
    """An estimate and its confidence interval, as shares in [0, 1]."""

    k: int
    mean: float
    low: float
    high: float
    problems: int
    """Problems that it rests on."""


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that at least one of `k` samples, drawn without replacement from `samples`, is correct.

    1 - C(samples - correct, k) / C(samples, k) (arXiv 2107.03374). Raises ValueError unless
    1 <= k <= samples and 0 <= correct <= samples.
    """
    if not (1 <= k <= samples and 0 <= correct <= samples):
        raise ValueError(f"pass@{k} cannot be had from {correct} correct of {samples} samples")
    return 1 - comb(samples - correct, k) / comb(samples, k)


def estimate_pass_at_k(counts: Sequence[tuple[int, int]], k: int, confidence: float = 0.95, seed: int = 0) -> PassAtK:
    """Mean pass@k over problems; `counts` holds (graded samples, correct ones) of each problem.

    The interval is the percentile bootstrap over problems (2,000 resamples, seeded): it tells how much
    another choice of problems would change the mean. A problem with fewer than `k` graded samples is
    left out; ValueError where none is left.
    """
    values = np.array([pass_at_k(samples, correct, k) for samples, correct in counts if samples >= k])
    if not values.size:
        raise ValueError(f"no problem has {k} graded samples, which pass@{k} needs")
    chosen = np.random.default_rng(seed).integers(values.size, size=(RESAMPLES, values.size))
    low, high = np.quantile(values[chosen].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return PassAtK(k, float(values.mean()), float(low), float(high), values.size)
