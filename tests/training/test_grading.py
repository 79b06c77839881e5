"""What becomes of a trace's segments when they are graded, and how long its verifier may take."""

import asyncio

import pytest
from helpers.graded import stage

from exprl_megatron.config.verifying import VerifierConfig
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.problems.problem import Problem
from exprl_megatron.rollout.group import GradedTrace, JudgedSegment
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.training import grading
from exprl_megatron.training.grading import grade_of, verified

TRACE = Trace("p", 0, (1,), (2, 3), (-0.5, -0.5), "ans 3", "stop", (("v0", 0, 2),))


class Watched:
    """Tells how long it was given."""

    def __init__(self):
        self.given: list[float] = []

    async def verify(self, problem, text, deadline_s):
        self.given.append(deadline_s)
        return Scored(1.0, "")


def test_a_program_has_longer_than_an_answer():
    watched = Watched()
    grade = verified(watched, VerifierConfig(answer_deadline_s=2.0, program_deadline_s=90.0))
    for domain in ("math", "code"):
        asyncio.run(grade(Problem(id="p", text="?", domain=domain, answer="3"), TRACE))
    assert watched.given == [2.0, 90.0]


def test_every_segment_counts_as_a_verdict_that_was_asked_for():
    judgements = [Scored(0.5, ""), Abstained("timeout", ""), Scored(1.0, "")]
    segments = tuple(JudgedSegment(i, i + 1, judgement) for i, judgement in enumerate(judgements))
    assert GradedTrace(TRACE, judgements[1], segments).judgements == judgements
    assert GradedTrace(TRACE, judgements[0]).judgements == judgements[:1]


class Judge:
    """Gives the next of `verdicts` to each text, and keeps what it was asked."""

    def __init__(self, *verdicts):
        self.verdicts, self.asked = list(verdicts), []

    async def grade(self, problem, text, granularity="trace"):
        self.asked.append((text, granularity))
        return self.verdicts.pop(0)

    async def grade_prefixes(self, problem, texts):
        return [await self.grade(problem, text, "prefix") for text in texts]


async def by_answer(problem, trace):
    return GradedTrace(trace, Scored(1.0, "right"))


PROBLEM = Problem(id="p", text="?", answer="3")
HALF, NONE, ONE = Scored(0.5, ""), Abstained("timeout", ""), Scored(1.0, "")
REFUSED = Abstained("refused", "")


def graded_by_segments(monkeypatch, granularity, *verdicts):
    """A trace of as many segments as verdicts, each of one token, and what the judge was asked."""

    def cut(token_ids, tokenizer, config, how):
        assert how == granularity and tokenizer == "the policy's"
        return [(i, i + 1) for i in range(len(verdicts))], [f"text {i}" for i in range(len(verdicts))]

    monkeypatch.setattr(grading, "segments_and_texts", cut)
    judge = Judge(*verdicts)
    process = stage("exprl-process", granularity=granularity)
    return asyncio.run(grade_of(process, judge, by_answer, "the policy's")(PROBLEM, TRACE)), judge.asked


@pytest.mark.parametrize("granularity", ["segment", "prefix"])
@pytest.mark.parametrize(
    ("verdicts", "of_the_trace"),
    [
        ((HALF, ONE), ONE),
        ((ONE, HALF), HALF),
        ((NONE, ONE), NONE),
        ((ONE, NONE), NONE),
        ((HALF, REFUSED, NONE, ONE), REFUSED),
    ],
)
def test_a_trace_has_its_last_segments_verdict_and_where_the_judge_abstained_from_any_the_first_abstention(
    monkeypatch, granularity, verdicts, of_the_trace
):
    found, asked = graded_by_segments(monkeypatch, granularity, *verdicts)
    assert found.judgement == of_the_trace
    assert found.segments == tuple(JudgedSegment(i, i + 1, verdict) for i, verdict in enumerate(verdicts))
    assert asked == [(f"text {i}", granularity) for i in range(len(verdicts))]
    assert found.verified == Scored(1.0, "right")


def test_a_judge_of_whole_traces_reads_the_whole_text_and_the_verifiers_result_does_not_count():
    judge = Judge(HALF)
    found = asyncio.run(grade_of(stage("exprl-outcome"), judge, by_answer, None)(PROBLEM, TRACE))
    assert judge.asked == [("ans 3", "trace")]
    assert (found.judgement, found.verified, found.segments) == (HALF, Scored(1.0, "right"), ())


def test_where_no_judge_grades_the_verifiers_result_is_the_judgement():
    found = asyncio.run(grade_of(stage("sparse-rl"), None, by_answer, None)(PROBLEM, TRACE))
    assert (found.judgement, found.verified) == (Scored(1.0, "right"), None)
