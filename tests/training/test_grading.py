"""What becomes of a trace's segments when they are graded, and how long its verifier may take."""

import asyncio

from exprl_megatron.config.verifying import VerifierConfig
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.problems.problem import Problem
from exprl_megatron.rollout.group import GradedTrace, JudgedSegment
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.training.grading import verified

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
