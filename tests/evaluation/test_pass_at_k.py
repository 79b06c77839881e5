"""pass@k against known values, brute force, and what a bootstrap interval has to be."""

from itertools import combinations

import pytest

from exprl_megatron.evaluation.pass_at_k import estimate_pass_at_k, pass_at_k


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
