"""Counts of verdicts, and the pass@k that they allow of."""

import pytest

from exprl_megatron.evaluation.sample_counts import SampleCounts, count_samples, estimate_each_k
from exprl_megatron.judging.judgement import Abstained, Scored


def test_abstentions_are_not_part_of_the_graded_samples():
    verdicts = [Scored(1.0), Abstained("verifier-timeout"), Scored(0.0), Abstained("no-verifier")]
    found = count_samples([*verdicts, Scored(1.0), Abstained("verifier-timeout")])
    assert found == SampleCounts(3, 2, {"no-verifier": 1, "verifier-timeout": 2})
    assert found.solve_rate == pytest.approx(2 / 3)
    assert count_samples([Abstained("no-verifier")]).solve_rate is None


def test_pass_at_k_rests_on_the_problems_with_enough_graded_samples():
    counts = [SampleCounts(4, 1), SampleCounts(2, 2), SampleCounts(0, 0, {"no-verifier": 4})]
    one, two, four = estimate_each_k(counts, (1, 2, 4, 5), 0.95)
    # By hand: pass@1 is 1/4 and 1, pass@2 of one in four is 1 - 3/6, pass@4 is 1.
    assert (one.k, one.mean, one.problems) == (1, pytest.approx(0.625), 2)
    assert (two.k, two.mean, two.problems) == (2, pytest.approx(0.75), 2)
    assert (four.k, four.mean, four.problems) == (4, 1.0, 1)


def test_without_any_verdict_there_is_no_estimate():
    assert estimate_each_k([SampleCounts(0, 0, {"no-verifier": 4})], (1, 4), 0.95) == []
