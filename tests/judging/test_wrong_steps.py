"""Constructed process judges at the first wrong step: perfect, inverted, blind."""

import asyncio
import math

import pytest

from exprl_megatron.judging.champ import MarkedTrace
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.judging.wrong_steps import GRANULARITIES, judge_wrong_steps
from exprl_megatron.problems.problem import Problem, Reference

TEXT = "First this is right. Now comes WRONG work. More."
MARK = (21, 42)
PROBLEMS = [Problem(f"p{i}", "?", Reference("!")) for i in range(8)]
TRACES = [
    *(MarkedTrace(problem, "a", TEXT, MARK) for problem in PROBLEMS),
    MarkedTrace(PROBLEMS[0], "b", "All of this is right.", None),
    MarkedTrace(PROBLEMS[1], "b", "WRONG from the start.", (0, 21)),
]


async def perfect(problem, text, granularity):
    return Scored(0.0 if "WRONG" in text else 1.0)


async def inverted(problem, text, granularity):
    return Scored(1.0 if "WRONG" in text else 0.0)


async def blind(problem, text, granularity):
    return Scored(0.5)


def figures(grade, granularity="prefix"):
    return asyncio.run(judge_wrong_steps(grade, TRACES, granularity))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    "grade, area, bounds", [(perfect, 1.0, (0.6306, 1)), (inverted, 0.0, (0, 0.3694)), (blind, 0.5, (0.5, 0.5))]
)
def test_the_auroc_of_constructed_judges(grade, area, bounds, granularity):
    found = figures(grade, granularity)
    assert found.auroc == found.paired_auroc == area
    # At 0 and 1 the bound is that of eight problems: 1 - 0.025 ** (1 / 8).
    assert (found.interval.low, found.interval.high) == pytest.approx(bounds, abs=1e-4)
    assert (found.granularity, found.traces, found.marked) == (granularity, 10, 9)
    assert found.judgements == 18


@pytest.mark.parametrize(
    "grade, pairs",
    [(perfect, (8, 0, 0)), (inverted, (0, 0, 8)), (blind, (0, 8, 0))],
    ids=["perfect", "inverted", "blind"],
)
def test_pairs_that_fall_stay_equal_and_rise_are_counted(grade, pairs):
    found = figures(grade)
    assert (found.falls, found.equals, found.rises) == pairs
    assert [found.to_dict()[name] for name in ("falls", "equals", "rises")] == list(pairs)


def test_scores_that_differ_by_a_rounding_are_equal():
    async def grade(problem, text, granularity):
        return Scored(0.1 + 0.2 if "WRONG" in text else 0.3)

    found = figures(grade)
    assert (found.falls, found.equals, found.rises, found.paired_auroc) == (0, 8, 0, 0.5)


def test_means_are_scores_before_and_after_the_mark():
    found = figures(perfect)
    assert (found.mean_before, found.mean_after, found.mean_unmarked) == (5, 1, 5)
    assert found.to_dict()["interval"] == pytest.approx({"low": 0.6306, "high": 1}, abs=1e-4)


def test_a_judge_of_lengths_is_distinguished_by_pairs():
    async def grade(problem, text, granularity):
        return Scored(1 - len(text) / 100)

    found = figures(grade)
    assert found.paired_auroc == 1
    assert found.auroc < 1


def test_abstentions_are_left_out():
    async def grade(problem, text, granularity):
        return Abstained("unreadable") if problem.id == "p2" else await perfect(problem, text, granularity)

    found = figures(grade)
    assert (found.auroc, found.abstained, found.judgements) == (1, 2, 18)

    async def silent(problem, text, granularity):
        return Abstained("timeout")

    found = figures(silent)
    assert math.isnan(found.auroc)
    assert found.to_dict()["auroc"] is None
    assert found.abstained == 18
