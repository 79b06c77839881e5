"""Constructed judges through the three arms: each figure says what the judge is made to do."""

import asyncio
import json
import math

import pytest

from exprl_megatron.judging.arms import ARMS, Consistency, arm_metrics, arm_problems, judge_arm
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.judging.labeled_traces import LabeledTrace
from exprl_megatron.problems.problem import Problem, Reference

PROBLEMS = [
    Problem(f"p{i}", f"What is {i}?", Reference(f"It is {i}."), str(i), choices=("x", "y")) for i in range(1, 7)
]
TRACES = [
    LabeledTrace(problem, text, text == problem.answer)
    for problem in PROBLEMS
    for text in (problem.answer, problem.answer + "0")
]


async def reads_the_reference(problem, text, granularity):
    """5 where the trace ends as the reference does, 1 where it does not, 5 where there is no reference."""
    assert granularity == "trace"
    known = problem.reference is None or f"It is {text}." == problem.reference.for_judge()
    return Scored(1.0 if known else 0.0)


def figures(grade, arm):
    return arm_metrics(arm, TRACES, asyncio.run(judge_arm(grade, TRACES, arm)))


def test_the_arms_change_nothing_but_what_the_judge_may_know():
    assert list(arm_problems(PROBLEMS, "right").values()) == PROBLEMS
    none, wrong = arm_problems(PROBLEMS, "none"), arm_problems(PROBLEMS, "wrong")
    assert none["p1"] == Problem("p1", "What is 1?", None, None, choices=("x", "y"))
    # p1 gets p4's, p6 gets p1's: the released rule.
    assert wrong["p1"] == Problem("p1", "What is 1?", Reference("It is 4."), "4", choices=("x", "y"))
    assert wrong["p6"].reference == PROBLEMS[0].reference


def test_a_judge_that_reads_the_reference_shows_it_in_the_arms():
    right, none, wrong = (figures(reads_the_reference, arm) for arm in ARMS)
    assert (right.misplaced.rate, right.auroc) == (0, 1)
    # None of six problems is misplaced: 1 - 0.025 ** (1 / 6).
    assert (right.interval.low, right.interval.high) == pytest.approx((0, 0.4593), abs=1e-4)
    assert (none.misplaced.false_positive, none.misplaced.false_negative, none.auroc) == (1, 0, 0.5)
    assert (wrong.misplaced.false_negative, wrong.misplaced.false_positive) == (1, 0)
    assert right.right_scores == (0, 0, 0, 0, 6)
    assert right.wrong_scores == (6, 0, 0, 0, 0)


def test_abstentions_are_counted_by_reason_and_left_out():
    async def grade(problem, text, granularity):
        if problem.id == "p1":
            return Abstained("too-long")
        if problem.id == "p2" and text == "2":
            return Abstained("unreadable")
        return await reads_the_reference(problem, text, granularity)

    found = figures(grade, "right")
    assert found.abstained == {"too-long": 2, "unreadable": 1}
    assert found.misplaced.rate == 0
    assert (sum(found.right_scores), sum(found.wrong_scores)) == (4, 5)


def test_a_judge_that_likes_long_traces_shows_its_bias():
    traces = [LabeledTrace(PROBLEMS[i % 6], "x" * (i + 1), i % 2 == 0) for i in range(12)]
    judgements = [Scored(min(len(trace.text), 8) / 8) for trace in traces]
    found = arm_metrics("right", traces, judgements)
    assert found.right_length_bias > 0.8
    assert found.wrong_length_bias > 0.8
    assert math.isnan(arm_metrics("right", traces, [Scored(0.5)] * 12).right_length_bias)


def test_consistency_is_taken_over_traces_with_two_scores():
    traces = TRACES[:3]
    rounds = [
        [Scored(1.0), Scored(0.0), Abstained("unreadable")],
        [Scored(1.0), Scored(1.0), Abstained("unreadable")],
        [Scored(1.0), Abstained("timeout"), Scored(0.5)],
    ]
    found = arm_metrics("right", traces, rounds[0], rounds)
    # The first trace agrees with itself; the second has 1 and 5, whose standard deviation is sqrt(8).
    assert found.consistency == Consistency(3, 0.5, pytest.approx(math.sqrt(8) / 2))
    assert arm_metrics("right", traces, rounds[0]).consistency is None


def test_the_record_is_json_without_nan():
    record = arm_metrics("none", TRACES, [Abstained("timeout")] * len(TRACES)).to_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == {
        "arm": "none",
        "traces": 12,
        "misplaced": {"false_negative": None, "false_positive": None},
        "misplacement": None,
        "interval": None,
        "auroc": None,
        "abstained": {"timeout": 12},
        "right_scores": [0, 0, 0, 0, 0],
        "wrong_scores": [0, 0, 0, 0, 0],
        "right_length_bias": None,
        "wrong_length_bias": None,
        "consistency": None,
    }


def test_the_first_failure_of_a_server_is_raised_as_it_is():
    async def grade(problem, text, granularity):
        if problem.id == "p3":
            raise ConnectionError("the server is dead")
        await asyncio.sleep(3600)

    with pytest.raises(ConnectionError, match="the server is dead"):
        asyncio.run(judge_arm(grade, TRACES, "right"))
