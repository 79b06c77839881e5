"""How a stage grades a finished trace: by the judge, whole or by segments, or by the verifier of its answer."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from exprl_megatron.config.stages import ExprlOutcomeStage, ExprlProcessStage, RlStage
from exprl_megatron.config.verifying import VerifierConfig
from exprl_megatron.judging.judgement import Abstained, Judgement, Unit
from exprl_megatron.judging.segments import segments_and_texts
from exprl_megatron.problems.problem import Problem
from exprl_megatron.rewards.verifier import AnswerVerifier
from exprl_megatron.rollout.group import GradedTrace, JudgedSegment
from exprl_megatron.rollout.trace import Trace

Grade = Callable[[Problem, Trace], Awaitable[GradedTrace]]


class Grades(Protocol):
    """The part of the judge that grading needs."""

    async def grade(self, problem: Problem, text: str, unit: Unit = "trace") -> Judgement: ...

    async def grade_prefixes(self, problem: Problem, texts: Sequence[str]) -> list[Judgement]: ...


def grade_of(stage: RlStage, judge: Grades | None, by_answer: Grade, tokenizer: Any) -> Grade:
    """The function that grades the traces of `stage`; `tokenizer` is the policy's.

    Where a judge gives the grade, the verifier's finding (`by_answer`) goes along, for the logs alone.
    """
    if isinstance(stage, ExprlOutcomeStage):
        return _checked(_whole(judge), by_answer)
    if isinstance(stage, ExprlProcessStage):
        return _checked(_by_segments(stage, judge, tokenizer), by_answer)
    return by_answer


def verified(verifier: AnswerVerifier, config: VerifierConfig) -> Grade:
    """Grades by the final answer: 1 where it is right, else 0."""

    async def grade(problem: Problem, trace: Trace) -> GradedTrace:
        return GradedTrace(trace, await verifier.verify(problem, trace.text, config.deadline_s(problem.domain)))

    return grade


def _checked(by_judge: Grade, by_answer: Grade) -> Grade:
    async def grade(problem: Problem, trace: Trace) -> GradedTrace:
        judged, checked = await asyncio.gather(by_judge(problem, trace), by_answer(problem, trace))
        return GradedTrace(trace, judged.judgement, judged.segments, verified=checked.judgement)

    return grade


def _whole(judge: Grades) -> Grade:
    async def grade(problem: Problem, trace: Trace) -> GradedTrace:
        return GradedTrace(trace, await judge.grade(problem, trace.text))

    return grade


def _by_segments(stage: ExprlProcessStage, judge: Grades, tokenizer: Any) -> Grade:
    whole = _whole(judge)

    async def grade(problem: Problem, trace: Trace) -> GradedTrace:
        unit = stage.route(problem.domain).unit
        if unit == "trace":
            return await whole(problem, trace)
        spans, texts = await asyncio.to_thread(segments_and_texts, trace.token_ids, tokenizer, stage.segments, unit)
        if unit == "prefix":
            judgements = await judge.grade_prefixes(problem, texts)
        else:
            judgements = await asyncio.gather(*(judge.grade(problem, text, unit) for text in texts))
        segments = tuple(JudgedSegment(*span, j) for span, j in zip(spans, judgements, strict=True))
        failed = [judgement for judgement in judgements if isinstance(judgement, Abstained)]
        return GradedTrace(trace, (failed or judgements)[0 if failed else -1], segments)

    return grade
