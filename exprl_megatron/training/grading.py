"""Grades finished traces by the judge (as a whole or by segments), or by the answer verifier."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Protocol

from exprl_megatron.config.stages import ExprlOutcomeStage, ExprlProcessStage, RlStage, SparseRlStage
from exprl_megatron.config.verifying import VerifierConfig
from exprl_megatron.judging.judgement import Abstained, Granularity, Judgement
from exprl_megatron.judging.segments import segments_and_texts
from exprl_megatron.problems.problem import Problem
from exprl_megatron.rewards.verifier import AnswerVerifier
from exprl_megatron.rollout.custom_functions import CustomFunction
from exprl_megatron.rollout.group import GradedTrace, JudgedSegment
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.training.custom_rewards import reward_terms
from exprl_megatron.utils.required import required

GradeTrace = Callable[[Problem, Trace], Awaitable[GradedTrace]]


class TextGrader(Protocol):
    """The interface of the judge that grading uses."""

    async def grade(self, problem: Problem, text: str, granularity: Granularity = "trace") -> Judgement:
        """Judge a text; see Judge.grade."""
        ...

    async def grade_prefixes(self, problem: Problem, texts: Sequence[str]) -> list[Judgement]:
        """Judge prefixes of one trace; see Judge.grade_prefixes."""
        ...


def grade_of(stage: RlStage, judge: TextGrader | None, by_answer: GradeTrace, tokenizer: Any) -> GradeTrace:
    """Return the function that grades the traces of `stage`; `tokenizer` is the policy's.

    Where a judge grades, the verifier's result (`by_answer`) is added, only for the logs.
    """
    if isinstance(stage, ExprlOutcomeStage):
        return _checked(_whole(required(judge, "the judge")), by_answer)
    if isinstance(stage, ExprlProcessStage):
        return _checked(_by_segments(stage, required(judge, "the judge"), tokenizer), by_answer)
    return by_answer


def with_terms(
    stage: ExprlOutcomeStage | SparseRlStage, grade_trace: GradeTrace, custom: Mapping[str, CustomFunction]
) -> GradeTrace:
    """Return a function that grades as `grade_trace` does and adds the terms of the stage's reward.

    `custom` has the user's functions by the names of their terms.
    """

    async def grade(problem: Problem, trace: Trace) -> GradedTrace:
        graded = await grade_trace(problem, trace)
        judged = isinstance(stage, ExprlOutcomeStage)
        found = {"judge": graded.judgement, "verifier": graded.verified if judged else graded.judgement}
        terms = await reward_terms(stage.reward, custom, found, problem, trace, stage.sampling.max_new_tokens)
        return replace(graded, terms=terms)

    return grade


def verified(
    verifier: AnswerVerifier | None, config: VerifierConfig, custom: Mapping[str, CustomFunction] = MappingProxyType({})
) -> GradeTrace:
    """Return a function that grades by the final answer: 1 where it is right, else 0.

    `custom` has the user's verifiers by domain. `verifier` is needed for problems of other domains.
    """

    async def grade(problem: Problem, trace: Trace) -> GradedTrace:
        if problem.domain in custom:
            return GradedTrace(trace, await custom[problem.domain].verify(problem, trace))
        built_in = required(verifier, "the answer verifier")
        return GradedTrace(trace, await built_in.verify(problem, trace.text, config.deadline_s(problem.domain)))

    return grade


def _checked(by_judge: GradeTrace, by_answer: GradeTrace) -> GradeTrace:
    async def grade(problem: Problem, trace: Trace) -> GradedTrace:
        judged, checked = await asyncio.gather(by_judge(problem, trace), by_answer(problem, trace))
        return GradedTrace(trace, judged.judgement, judged.segments, verified=checked.judgement)

    return grade


def _whole(judge: TextGrader) -> GradeTrace:
    async def grade(problem: Problem, trace: Trace) -> GradedTrace:
        return GradedTrace(trace, await judge.grade(problem, trace.text))

    return grade


def _by_segments(stage: ExprlProcessStage, judge: TextGrader, tokenizer: Any) -> GradeTrace:
    whole = _whole(judge)

    async def grade(problem: Problem, trace: Trace) -> GradedTrace:
        granularity = stage.route(problem.domain).granularity
        if granularity == "trace":
            return await whole(problem, trace)
        spans, texts = await asyncio.to_thread(
            segments_and_texts, trace.token_ids, tokenizer, stage.segments, granularity
        )
        if granularity == "prefix":
            judgements = await judge.grade_prefixes(problem, texts)
        else:
            judgements = await asyncio.gather(*(judge.grade(problem, text, granularity) for text in texts))
        segments = tuple(JudgedSegment(*span, j) for span, j in zip(spans, judgements, strict=True))
        failed = [judgement for judgement in judgements if isinstance(judgement, Abstained)]
        return GradedTrace(trace, (failed or judgements)[0 if failed else -1], segments)

    return grade
