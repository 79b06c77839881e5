"""Confidence intervals of means over seeds and problems, and of differences between two such means.

Every seed is evaluated on the same problems, so seeds and problems are crossed, and the variance of the mean is
estimated by the two-way random-effects decomposition. Student's t accounts for how few seeds there are.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, ndtri, stdtrit

METHOD = "Korn-Graubard"
DIFFERENCE_METHOD = "paired t"


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class _Variance:
    """Variance components of the mean of values [..., seeds, problems]; each component has shape [...]."""

    seeds: np.ndarray
    """Share of the variance that comes from the seeds, with what seeds and problems have together."""
    shared: np.ndarray
    """The residual's share, which is a part of `seeds`, and which the variance between problem means holds too."""


def mean_bounds(values: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds of the mean of shares in [0, 1], float64 [..., seeds, problems], as two arrays [...].

    The interval of Korn and Graubard (Survey Methodology 24, 1998): Clopper-Pearson with the effective number of
    trials that the variance of the mean implies, reduced by the squared ratio of the normal to the t quantile. It
    stays within [0, 1] and has a width where all values are 0 or 1: there the trials are the problems. The bound next
    to the boundary is nowhere closer to it than in that case, so that one success does not narrow an interval.
    With one seed it covers the choice of problems alone.
    """
    seeds, problems = values.shape[-2:]
    mean = values.mean((-2, -1))
    variance = _variance(values)
    between = np.maximum(_variance_of_mean(values.mean(-2)) - variance.shared, 0)
    upper = (1 + confidence) / 2
    squared = (
        stdtrit(max(seeds - 1, 1), upper) ** 2 * variance.seeds + stdtrit(max(problems - 1, 1), upper) ** 2 * between
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        trials = np.where(squared > 0, mean * (1 - mean) / squared * ndtri(upper) ** 2, problems)
    low, high = _clopper_pearson(mean, trials, confidence)
    margin = boundary_margin(problems, confidence)
    return np.minimum(low, 1 - margin), np.maximum(high, margin)


def difference_bounds(first: np.ndarray, second: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds of mean(first) - mean(second), float64 [..., seeds, problems] each, as two arrays [...].

    The problems are the same in the same order, and their differences are paired; the seeds of the two sides are
    independent and may differ in number. A t interval with Satterthwaite's degrees of freedom (Welch's, with the
    problems as a third component). Where both means are so close to 0 or 1 that the data of one problem decide (within
    `boundary_margin`), Newcombe's square-and-add interval (Statistics in Medicine 17, 1998, method 10) of the two
    `mean_bounds`.

    Raises:
        ValueError: the numbers of problems differ.
    """
    problems = first.shape[-1]
    if second.shape[-1] != problems:
        raise ValueError(f"{problems} problems cannot be paired with {second.shape[-1]}")
    means = first.mean((-2, -1)), second.mean((-2, -1))
    difference = means[0] - means[1]
    parts = _variance(first), _variance(second)
    paired = _variance_of_mean(first.mean(-2) - second.mean(-2))
    between = np.maximum(paired - parts[0].shared - parts[1].shared, 0)
    freedom = _satterthwaite(
        [(parts[0].seeds, first.shape[-2] - 1), (parts[1].seeds, second.shape[-2] - 1), (between, problems - 1)]
    )
    half = stdtrit(freedom, (1 + confidence) / 2) * np.sqrt(parts[0].seeds + parts[1].seeds + between)
    (low1, high1), (low2, high2) = mean_bounds(first, confidence), mean_bounds(second, confidence)
    margin = boundary_margin(problems, confidence)
    at_boundary = np.logical_and(*(np.minimum(mean, 1 - mean) <= margin for mean in means))
    low = np.where(at_boundary, np.hypot(means[0] - low1, high2 - means[1]), half)
    high = np.where(at_boundary, np.hypot(high1 - means[0], means[1] - low2), half)
    return np.maximum(difference - low, -1), np.minimum(difference + high, 1)


def boundary_margin(units: int, confidence: float = 0.95) -> float:
    """Return the upper Clopper-Pearson bound of a share of which `units` independent units show nothing; 3.7 / units
    for 95 %.
    """
    return 1 - ((1 - confidence) / 2) ** (1 / units)


def _variance(values: np.ndarray) -> _Variance:
    """Return the components of the variance of the mean of [..., seeds, problems]; zero with one seed, whose luck is
    unknown.
    """
    seeds, problems = values.shape[-2:]
    if seeds == 1:
        return _Variance(np.zeros(values.shape[:-2]), np.zeros(values.shape[:-2]))
    of_seed = values.mean(-1, keepdims=True)
    residual = values - of_seed - values.mean(-2, keepdims=True) + values.mean((-2, -1), keepdims=True)
    freedom = (seeds - 1) * max(problems - 1, 1)
    shared = np.square(residual).sum((-2, -1)) / freedom / (seeds * problems)
    # The variance between seed means expects at least the residual's, of which there are far more degrees of freedom.
    return _Variance(np.maximum(_variance_of_mean(of_seed[..., 0]), shared), shared)


def _variance_of_mean(values: np.ndarray) -> np.ndarray:
    """Return the squared standard error of the mean over the last axis; zero for one value."""
    count = values.shape[-1]
    return values.var(-1, ddof=1) / count if count > 1 else np.zeros(values.shape[:-1])


def _satterthwaite(parts: list[tuple[np.ndarray, int]]) -> np.ndarray:
    """Return the degrees of freedom of a sum of (variance, degrees of freedom); 1 where all are zero."""
    total = sum(variance for variance, _ in parts)
    spread = sum(np.square(variance) / freedom for variance, freedom in parts if freedom)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > 0, np.square(total) / spread, 1.0)


def _clopper_pearson(mean: np.ndarray, trials: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the exact binomial bounds, for numbers of trials and successes that need not be whole."""
    right, wrong, tail = trials * mean, trials * (1 - mean), (1 - confidence) / 2
    low = np.where(right > 0, betaincinv(np.where(right > 0, right, 1), wrong + 1, tail), 0.0)
    high = np.where(wrong > 0, betaincinv(right + 1, np.where(wrong > 0, wrong, 1), 1 - tail), 1.0)
    return low, high
