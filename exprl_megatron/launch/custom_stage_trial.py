"""Trials of the stages of the user's own: one step without servers, whose traces are empty.

Every second trace is right and the others are wrong. What fails here would fail in the run: a prompt with a reference,
a trace that is not the step's, advantages that are not finite, a state that a checkpoint cannot keep.
"""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stage_kinds import CustomStageConfig
from exprl_megatron.config.stages import ExprlProcessStage, JudgedStage, RlStage
from exprl_megatron.errors import RunStopped, UserError
from exprl_megatron.judging.judgement import Judgement, Scored
from exprl_megatron.judging.leaks import LeakGuard
from exprl_megatron.plugins.failures import PluginError
from exprl_megatron.problems.sources import load_problems
from exprl_megatron.rollout.custom_stage import PromptProblem
from exprl_megatron.rollout.group import GradedTrace, Group, JudgedSegment, RewardTerm
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.runs.journal import SampledStep
from exprl_megatron.training.custom_rollouts import CustomPrompts, StepContext
from exprl_megatron.training.custom_stages import StageHooks


def check_custom_stages(config: RunConfig) -> None:
    """Make every stage of the user's own and check what needs no problem.

    Raises:
        PluginError: as StageHooks; or a stage cannot keep problems for, or sample with, what the config asks for.
    """
    hooks = {s.name: StageHooks(s, _silent) for s in config.stages if isinstance(s, CustomStageConfig)}
    for stage in config.stages:
        wanted = stage.problems_from if isinstance(stage, RlStage) else None
        if wanted is not None and not hooks[wanted].keeps_problems:
            raise PluginError(
                f"stage {stage.name}: problems_from is {wanted}, whose class has no kept_problems; write that method."
            )
        if not isinstance(stage, CustomStageConfig) or not hooks[stage.name].samples:
            continue
        custom: Any = stage
        if custom.max_staleness:
            raise PluginError(
                f"stage {custom.name}: max_staleness is {custom.max_staleness}, but {custom.kind} has a rollout of its "
                "own, whose steps follow each other; set it to 0."
            )
        if isinstance(custom, JudgedStage) and config.judge is not None and config.judge.placement == "policy":
            raise PluginError(
                f"stage {custom.name}: {custom.kind} has a rollout of its own, which judges between its samples, but "
                "judge.placement is policy; set it to own."
            )


def try_custom_stage(config: RunConfig, stage: Any) -> None:
    """Take one step with `stage`, without servers, and what a checkpoint and the stage's end do.

    Raises:
        UserError: a prompt of the user's own code has a reference; PluginError: the code fails or returns what it must
            not.
    """
    hooks = StageHooks(stage, _silent)
    sampler = _TrialSampler(config, stage)
    context = StepContext(sampler, stage, 1, 0, ())
    try:
        rollout = hooks.rollout(context) if hooks.samples else context.sample_step()
        groups: list[Group] = asyncio.run(rollout)
    except RunStopped as error:
        raise UserError(str(error)) from error
    hooks.learn(1, groups)
    hooks.kept_problems([problem.id for problem in sampler.shown_problems(stage)])
    StageHooks(stage, _silent).load_state(json.loads(json.dumps(hooks.state())))


def empty_trace(problem_id: str, sample: int = 0) -> Trace:
    """A trace of one token and no text."""
    return Trace(problem_id, sample, np.zeros(1), np.zeros(1), np.zeros(1), "", "stop", (("v0", 0, 1),))


class _TrialSampler:
    """StepSampler without servers."""

    def __init__(self, config: RunConfig, stage: RlStage):
        self._stage: Any = stage
        self._problems = load_problems(stage.problems)
        self._guard = LeakGuard(config.leak_guard, self._problems)

    def shown_problems(self, stage: RlStage) -> Sequence[PromptProblem]:
        return [PromptProblem(problem.id, problem.statement, problem.domain) for problem in self._problems]

    def drawn_problems(self, stage: RlStage, first: int, count: int) -> list[PromptProblem]:
        shown = self.shown_problems(stage)
        return [shown[place % len(shown)] for place in range(first, first + count)]

    async def sample_problems(
        self, context: StepContext, problem_ids: Sequence[str], group_size: int, prompts: CustomPrompts | None
    ) -> list[Group]:
        for problem_id, text in (prompts or {}).items():
            self._guard.check_custom_prompt(problem_id, text)
        return [self._group(problem_id, group_size) for problem_id in problem_ids]

    async def sample_built_in(self, context: StepContext) -> SampledStep:
        count = self._stage.problems_per_step
        drawn = self.drawn_problems(self._stage, context.next_problem, count)
        return SampledStep([self._group(problem.id, self._stage.group_size) for problem in drawn], count)

    async def judgement_of(self, stage: RlStage, trace: Trace, by: str) -> Judgement:
        if by == "judge" and not isinstance(stage, JudgedStage):
            raise ValueError("the stage has no judge; set its base to exprl-outcome or exprl-process")
        return Scored(0.0, "as a trial")

    def log(self, text: str) -> None:
        pass

    def _group(self, problem_id: str, group_size: int) -> Group:
        return Group(problem_id, tuple(self._graded(problem_id, k) for k in range(group_size)))

    def _graded(self, problem_id: str, sample: int) -> GradedTrace:
        judgement = Scored(float(sample % 2 == 0), "as a trial")
        trace = empty_trace(problem_id, sample)
        if isinstance(self._stage, ExprlProcessStage):
            return GradedTrace(trace, judgement, (JudgedSegment(0, 1, judgement),), verified=judgement)
        verified = judgement if isinstance(self._stage, JudgedStage) else None
        terms = tuple(
            RewardTerm(term.shown_name, term.term, term.weight, judgement.value) for term in self._stage.reward
        )
        return GradedTrace(trace, judgement, verified=verified, terms=terms)


def _silent(text: str) -> None:
    """Print nothing: trials report their failures as errors."""
