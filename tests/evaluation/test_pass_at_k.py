"""pass@k against known values, brute force, and what an interval over problems has to be."""

from itertools import combinations

import pytest

from exprl_megatron.evaluation.pass_at_k import estimate_gain, estimate_pass_at_k, pass_at_k


@pytest.mark.parametrize(
    ("samples", "correct", "k", "expected"),
    [(128, 64, 1, 0.5), (128, 4, 16, 0.417808), (4, 1, 2, 0.5), (16, 0, 16, 0.0), (16, 1, 16, 1.0), (5, 5, 1, 1.0)],
)
def test_pass_at_k_has_the_known_values(samples, correct, k, expected):
    assert pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-6)


def test_pass_at_k_is_the_share_of_all_draws_that_hit():
    marks = [True] * 3 + [False] * 5
    for k in range(1, 9):
        draws = [any(draw) for draw in combinations(marks, k)]
        assert pass_at_k(8, 3, k) == pytest.approx(sum(draws) / len(draws))


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_impossible_counts_are_refused(samples, correct, k):
    with pytest.raises(ValueError, match=f"pass@{k}"):
        pass_at_k(samples, correct, k)


def test_the_estimate_is_the_mean_over_problems_within_its_interval():
    counts = [(16, i % 5) for i in range(100)]
    estimate = estimate_pass_at_k(counts, 1)
    assert estimate.mean == pytest.approx(0.125)
    # The normal approximation of the same interval: 1.96 standard errors of the mean over problems.
    error = 1.96 * (0.0078125 / 99) ** 0.5
    assert estimate.mean - estimate.low == pytest.approx(error, rel=0.1)
    assert estimate.high - estimate.mean == pytest.approx(error, rel=0.1)
    assert estimate == estimate_pass_at_k(counts, 1)
    assert estimate_pass_at_k(counts, 1, confidence=0.5).high < estimate.high


def test_problems_with_too_few_graded_samples_are_left_out():
    estimate = estimate_pass_at_k([(16, 16), (3, 0)], 4)
    assert (estimate.mean, estimate.problems) == (1.0, 1)
    with pytest.raises(ValueError, match="no problem has 4 graded samples"):
        estimate_pass_at_k([(3, 0)], 4)


@pytest.mark.parametrize(("right", "bounds"), [(0, (0, 0.0365)), (16, (0.9635, 1))])
def test_counts_that_are_all_zero_or_all_one_have_an_interval_with_a_width(right, bounds):
    # 1 - 0.025 ** (1 / 99.3), about 3.7 / n: the bound of Clopper and Pearson for no success in n = 99 problems.
    for k in (1, 16):
        estimate = estimate_pass_at_k([(16, right)] * 99, k)
        assert (estimate.low, estimate.high) == pytest.approx(bounds, abs=2e-4)


def test_a_success_does_not_narrow_an_interval():
    none, one = (estimate_pass_at_k([(16, right)] + [(16, 0)] * 63, 1) for right in (0, 1))
    assert one.high >= none.high - 1e-9


def test_a_gain_is_paired_by_problem():
    before = {str(i): (16, i % 9) for i in range(90)} | {"gone": (16, 3)}
    after = {str(i): (16, i % 9 + i % 2) for i in range(90)} | {"few": (0, 0)}
    gain = estimate_gain(before, after, 1)
    assert (gain.mean, gain.problems) == (pytest.approx(1 / 32), 90)
    # Differences of 0 or 1/16, half of each: the t interval of 90 such.
    half = 1.98698 * (1 / 32) / 89**0.5
    assert (gain.mean - gain.low, gain.high - gain.mean) == pytest.approx((half, half), rel=1e-4)
    assert estimate_gain(before, {"other": (16, 1)}, 1) is None
