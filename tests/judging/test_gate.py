import asyncio

from exprl_megatron.config.judging import GateConfig
from exprl_megatron.errors import RunStopped
from exprl_megatron.judging.gate import JudgeGate
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.judging.labeled_traces import LabeledTrace
from exprl_megatron.problems.problem import Problem, Reference

PROBLEMS = [Problem(f"p{i}", f"What is {i}?", Reference(f"It is {i}."), str(i)) for i in range(1, 11)]
TRACES = [LabeledTrace(problem, text, text == problem.answer) for problem in PROBLEMS for text in (problem.answer, "0")]


def gate(**bounds) -> JudgeGate:
    return JudgeGate(GateConfig(traces="judged.jsonl", **bounds), TRACES)


def checked(grade, **bounds):
    """The result, and what `require` says (None: nothing)."""
    judge_gate = gate(**bounds)
    result = asyncio.run(judge_gate.evaluate(grade))
    try:
        judge_gate.require_pass(result, "before stage priming")
    except RunStopped as stopped:
        return result, str(stopped)
    return result, None


async def reader(problem, text, granularity):
    """Scores by the reference; without one everything passes."""
    known = problem.reference is None or problem.reference.for_judge() == f"It is {text}."
    return Scored(1.0 if known else 0.0)


async def knower(problem, text, granularity):
    """Solves the problem itself and never looks at the reference."""
    return Scored(1.0 if problem.text == f"What is {text}?" else 0.0)


async def yes_man(problem, text, granularity):
    return Scored(1.0)


async def silent(problem, text, granularity):
    return Abstained("unreadable")


def test_a_judge_that_reads_the_reference_passes():
    result, told = checked(reader)
    assert told is None
    assert result.metrics() == {
        "misplacement_right": 0,
        "misplacement_none": 0.5,
        "misplacement_wrong": 0.5,
        "separation": 0.5,
        "auroc": 1,
        "abstained": 0,
    }
    assert result.to_dict()["wrong"]["misplacement"] == 0.5


def test_a_judge_that_passes_everything_is_stopped_by_both_bounds():
    _, told = checked(yes_man)
    assert told.startswith("before stage priming: the judge did not pass its gate on 20 traces of judged.jsonl: ")
    assert "with the right reference it misplaces 50.0% [50.0, 50.0], more than max_misplacement (20.0%)" in told
    assert "with no reference it misplaces 50.0% [50.0, 50.0], which is not min_separation (10.0%) above the" in told
    assert "exprl judge-bench" in told
    assert "\n" not in told


def test_a_judge_that_needs_no_reference_passes_with_a_note():
    result, told = checked(knower)
    assert told is None
    note = gate().no_reference_note(result)
    # No error in ten problems: the exact 95 % bound is 1 - 0.025 ** (1 / 10).
    assert note.startswith("without a reference it misplaces 0.0% [0.0, 30.8], so that no separation is required; ")
    assert note.endswith("with a wrong reference it misplaces 0.0% [0.0, 30.8]")
    assert gate().no_reference_note(checked(reader)[0]) is None


def test_a_judge_that_needs_no_reference_and_obeys_a_wrong_one_passes():
    """As measured with a capable judge: 10 %, 10 % and 50 % misplaced."""

    async def grade(problem, text, granularity):
        if problem.reference is not None and problem.reference.for_judge() != f"It is {problem.id[1:]}.":
            return Scored(0.0)
        if problem.id in ("p1", "p2") and text != "0":
            return Scored(0.25)
        return await knower(problem, text, granularity)

    result, told = checked(grade)
    assert told is None
    rates = [result.metrics()[f"misplacement_{arm}"] for arm in ("right", "none", "wrong")]
    assert rates == [0.1, 0.1, 0.5]
    assert result.metrics()["separation"] == 0, "the smaller of the two differences"


def guesser(wrong_passes):
    """Never looks at the reference, and passes the wrong traces of these problems."""

    async def grade(problem, text, granularity):
        return Scored(1.0) if problem.id in wrong_passes else await knower(problem, text, granularity)

    return grade


def test_a_judge_that_is_wrong_without_a_reference_must_be_better_with_it():
    async def grade(problem, text, granularity):
        passed = ("p1", "p2", "p3") if problem.reference is not None else ("p1", "p2", "p3", "p4", "p5")
        return await guesser(passed)(problem, text, granularity)

    result, told = checked(grade, max_misplacement=0.2, min_separation=0.11)
    assert (result.right.misplaced.rate, result.none.misplaced.rate) == (0.15, 0.25)
    assert "max_misplacement" not in told
    assert "with no reference it misplaces 25.0%" in told
    assert "with a wrong reference it misplaces 15.0%" in told


def test_the_right_arms_bound_is_kept_whatever_the_judge_does_without_a_reference():
    async def grade(problem, text, granularity):
        return await (knower if problem.reference is None else yes_man)(problem, text, granularity)

    _, told = checked(grade)
    assert "with the right reference it misplaces 50.0%" in told
    assert "min_separation" not in told


def test_one_arm_that_is_not_apart_is_enough():
    async def grade(problem, text, granularity):
        """Reads every reference; a wrong one changes nothing."""
        if problem.reference is None:
            return await yes_man(problem, text, granularity)
        return await knower(problem, text, granularity)

    _, told = checked(grade)
    assert "with a wrong reference it misplaces 0.0%" in told
    assert "with no reference" not in told


def test_a_judge_without_verdicts_does_not_pass():
    result, told = checked(silent, max_misplacement=1, min_separation=0)
    assert result.metrics()["abstained"] == 1
    assert "with the right reference it misplaces an unknown share (abstained unreadable 20)" in told


def test_the_bounds_themselves_pass():
    async def grade(problem, text, granularity):
        """With the right reference one wrong trace in five passes."""
        if problem.reference is not None and problem.reference.for_judge() == f"It is {problem.id[1:]}.":
            return Scored(1.0 if problem.answer == text or problem.id in ("p1", "p2") else 0.0)
        return Scored(1.0)

    assert checked(grade, max_misplacement=0.1, min_separation=0.4)[1] is None
    assert "max_misplacement (9.9%)" in checked(grade, max_misplacement=0.099)[1]
    assert "min_separation (40.1%)" in checked(grade, min_separation=0.401)[1]
