"""Simulated coverage of the intervals of exprl_megatron/utils/intervals.py: `python tools/interval_coverage.py`.

Prints a Markdown table: for each number of seeds, the lowest and highest coverage over populations of problems.
"""

import argparse
from functools import cache

import numpy as np
from scipy.special import expit, logit

from exprl_megatron.utils.intervals import difference_bounds, mean_bounds

PROBLEMS = 128
SAMPLES = 16
SHIFT = 1.0
"""By how much the second arm's logits are above the first one's."""
POPULATIONS = {
    "bimodal": lambda draw, size: draw.normal(np.where(draw.random(size) < 0.5, -3, 3), 1),
    "hard": lambda draw, size: draw.normal(-4, 1.5, size),
    "easy": lambda draw, size: draw.normal(4, 1.5, size),
    "alike": lambda draw, size: np.full(size, logit(0.7)),
}
"""Logits of the problems' success rates."""


def coverage(population: str, seeds: int, deviation: float, trials: int) -> tuple[float, float]:
    """Return the shares of `trials` whose 95 % interval holds the truth: of the mean of one arm, and of a difference of
    two.

    Args:
        population: a key of POPULATIONS.
        seeds: in each arm.
        deviation: standard deviation between seeds, on the logit.
        trials: simulated studies.
    """
    draw = np.random.default_rng(seeds)
    problems = POPULATIONS[population](draw, (trials, 1, PROBLEMS))

    def shares(shift: float) -> np.ndarray:
        of_seed = draw.normal(0, deviation, (trials, seeds, 1))
        return draw.binomial(SAMPLES, expit(problems + shift + of_seed)) / SAMPLES

    base, shifted = shares(0.0), shares(SHIFT)
    truth, other = _truth(population, deviation, 0.0), _truth(population, deviation, SHIFT)
    return _covered(mean_bounds(base), truth), _covered(difference_bounds(shifted, base), other - truth)


@cache
def _truth(population: str, deviation: float, shift: float) -> float:
    """Return the mean over the population of problems and seeds, from 50,000 draws."""
    draw = np.random.default_rng(99)
    return expit(POPULATIONS[population](draw, 50_000) + shift + draw.normal(0, deviation, 50_000)).mean()


def _covered(bounds: tuple[np.ndarray, np.ndarray], truth: float) -> float:
    low, high = bounds
    return float(((low <= truth) & (truth <= high)).mean())


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    deviations = (0.0, 0.3, 1.0)
    head = ["seeds", *(f"{what}, sd {sd:g}" for sd in deviations for what in ("mean", "difference"))]
    print("| " + " | ".join(head) + " |")
    print("| " + " | ".join(["---"] * len(head)) + " |")
    for seeds in (3, 5, 10):
        cells = []
        for deviation in deviations:
            found = zip(*(coverage(name, seeds, deviation, 3000) for name in POPULATIONS), strict=True)
            cells += [f"{min(of_kind):.3f} to {max(of_kind):.3f}" for of_kind in found]
        print(f"| {seeds} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
