"""Intervals over seeds and problems: their coverage in simulation, and closed forms from scipy."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from exprl_megatron.utils.intervals import boundary_margin, difference_bounds, mean_bounds


@pytest.fixture(scope="module")
def simulation():
    file = Path(__file__).parents[2] / "tools" / "interval_coverage.py"
    spec = importlib.util.spec_from_file_location("interval_coverage", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("population", ["bimodal", "hard", "easy", "alike"])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_95_percent_intervals_cover_what_they_promise(simulation, seeds, population):
    for deviation in (0.0, 0.3, 1.0):
        mean, difference = simulation.coverage(population, seeds, deviation, trials=700)
        assert mean >= 0.92 and difference >= 0.92


def test_without_seeds_or_problems_that_differ_the_interval_is_that_of_a_binomial():
    values = np.random.default_rng(0).permutation(np.repeat([0.0, 1.0], [70, 30]))[None]
    low, high = mean_bounds(values)
    # Korn and Graubard: 30 of 100 with t for the variance (99 degrees of freedom), n - 1 in place of n.
    trials = 99 * (stats.norm.ppf(0.975) / stats.t.ppf(0.975, 99)) ** 2
    assert low == pytest.approx(stats.beta.ppf(0.025, 0.3 * trials, 0.7 * trials + 1))
    assert high == pytest.approx(stats.beta.ppf(0.975, 0.3 * trials + 1, 0.7 * trials))


@pytest.mark.parametrize("units", [1, 10, 128])
def test_no_success_leaves_the_exact_binomial_bound(units):
    exact = stats.binomtest(0, units).proportion_ci(0.95, "exact").high
    assert boundary_margin(units) == pytest.approx(exact)
    assert mean_bounds(np.zeros((3, units))) == pytest.approx((0, exact))
    assert mean_bounds(np.ones((3, units))) == pytest.approx((1 - exact, 1))


def test_a_difference_at_the_boundary_is_newcombes():
    zeros, ones = np.zeros((3, 20)), np.ones((5, 20))
    margin = boundary_margin(20)
    assert difference_bounds(zeros, zeros) == pytest.approx((-margin, margin))
    assert difference_bounds(ones, zeros) == pytest.approx((1 - 2**0.5 * margin, 1))


def test_few_seeds_that_differ_leave_a_wide_interval():
    # Three seeds, one of which failed: two degrees of freedom say next to nothing.
    low, high = mean_bounds(np.repeat([[0.10], [0.90], [0.93]], 128, axis=1))
    assert low < 0.05 and high > 0.99


def test_one_more_confident_interval_contains_the_other():
    values = np.random.default_rng(1).random((4, 12))
    narrow, wide = mean_bounds(values, 0.8), mean_bounds(values, 0.99)
    assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]


def test_different_numbers_of_problems_cannot_be_paired():
    with pytest.raises(ValueError, match="12 problems cannot be paired with 11"):
        difference_bounds(np.zeros((3, 12)), np.zeros((3, 11)))
