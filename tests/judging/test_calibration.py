import math
from random import Random

import numpy as np
import pytest
from scipy import stats

from exprl_megatron.judging.calibration import (
    agreement,
    auroc,
    bootstrap_interval,
    histogram,
    mid_ranks,
    misplacement,
    rank_correlation,
    wrong_references,
)

# The released code's numbers: scores (None: unreadable), which traces are right, FNR, FPR, misplacement, AUROC.
RELEASED = [
    ([5, 4, 3, 1, 5, 2, None, 4], [1, 1, 1, 0, 0, 0, 1, 0], 0.333333, 0.5, 0.416667, 0.666667),
    ([3, 3, 3, 3], [1, 0, 1, 0], 1.0, 0.0, 0.5, 0.5),
]


@pytest.mark.parametrize("scores, correct, false_negative, false_positive, rate, area", RELEASED)
def test_misplacement_and_auroc_reproduce_the_released_numbers(
    scores, correct, false_negative, false_positive, rate, area
):
    correct = [bool(right) for right in correct]
    found = misplacement(scores, correct)
    assert found.false_negative == pytest.approx(false_negative, abs=1e-6)
    assert found.false_positive == pytest.approx(false_positive, abs=1e-6)
    assert found.rate == pytest.approx(rate, abs=1e-6)
    assert auroc(scores, correct) == pytest.approx(area, abs=1e-6)


def test_a_score_that_misses_four_by_a_rounding_is_a_four():
    assert misplacement([1 + 4 * (0.1 + 0.2 + 0.45), 3.99], [True, False]).rate == 0


def test_a_side_without_scores_has_no_share_and_no_rate():
    found = misplacement([None, 5], [True, False])
    assert math.isnan(found.false_negative)
    assert found.false_positive == 1
    assert math.isnan(found.rate)
    assert math.isnan(auroc([None, 5], [True, False]))


def test_auroc_equals_the_mann_whitney_statistic():
    rng = Random(0)
    scores = [rng.randint(1, 5) for _ in range(200)]
    correct = [rng.random() < 0.3 for _ in scores]
    right = [score for score, truth in zip(scores, correct, strict=True) if truth]
    wrong = [score for score, truth in zip(scores, correct, strict=True) if not truth]
    expected = stats.mannwhitneyu(right, wrong).statistic / (len(right) * len(wrong))
    assert auroc(scores, correct) == pytest.approx(expected, abs=1e-12)


def test_ranks_and_their_correlation_equal_scipys():
    rng = Random(1)
    x = [rng.randint(1, 5) for _ in range(100)]
    y = [rng.randint(10, 60) for _ in x]
    assert mid_ranks(x) == pytest.approx(stats.rankdata(x))
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


@pytest.mark.parametrize("x, y", [([1, 2], [3, 4]), ([2, 2, 2], [1, 2, 3]), ([1, 2, 3], [7, 7, 7])])
def test_a_correlation_that_is_not_defined_is_nan(x, y):
    assert math.isnan(rank_correlation(x, y))


def test_a_histogram_counts_the_nearest_whole_score():
    assert histogram([1, 1.4, 2.5, 4.6, 5]) == (2, 0, 1, 0, 2)
    assert histogram([]) == (0, 0, 0, 0, 0)


def test_agreement_is_the_share_of_equal_pairs():
    assert agreement([4, 4, 4]) == 1
    assert agreement([4, 4, 2]) == pytest.approx(1 / 3)
    assert math.isnan(agreement([4]))


def test_the_bootstrap_of_independent_items_has_the_width_of_the_binomial():
    hits = np.array([1.0] * 60 + [0.0] * 140)
    found = bootstrap_interval(range(200), lambda indices: hits[indices].mean())
    width = 1.96 * math.sqrt(0.3 * 0.7 / 200)
    assert found.low == pytest.approx(0.3 - width, abs=0.01)
    assert found.high == pytest.approx(0.3 + width, abs=0.01)


def test_the_bootstrap_takes_all_traces_of_a_problem_together():
    # Ten copies of an item tell no more than the item: the interval stays that of 20 items, not of 200.
    hits = np.repeat([1.0] * 6 + [0.0] * 14, 10)
    found = bootstrap_interval([i // 10 for i in range(200)], lambda indices: hits[indices].mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(0.3 * 0.7 / 20), abs=0.06)


def test_the_bootstrap_leaves_out_resamples_without_a_value():
    found = bootstrap_interval(range(20), lambda indices: math.nan if 0 in indices else 0.5)
    assert (found.low, found.high) == (0.5, 0.5)
    assert bootstrap_interval("ab", lambda indices: math.nan) is None
    assert bootstrap_interval("", lambda indices: 1.0) is None


def test_wrong_references_reproduce_the_released_map():
    keys = ["p1", "p2", "p3", "p4", "p5", "p6"]
    expected = {"p1": "p4", "p2": "p5", "p3": "p2", "p4": "p3", "p5": "p6", "p6": "p1"}
    assert wrong_references(keys) == expected
    assert wrong_references(reversed(keys)) == expected


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_0_or_1_has_the_exact_binomial_bound_of_so_many_problems(share):
    # 40 items of 20 problems: Clopper and Pearson for 0 or 20 of 20.
    found = bootstrap_interval([i // 2 for i in range(40)], lambda indices: share)
    exact = stats.binomtest(int(20 * share), 20).proportion_ci(0.95, "exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
