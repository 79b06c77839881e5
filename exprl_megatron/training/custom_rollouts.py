"""What a stage of the user's own samples with: the context of its hook `rollout`."""

import functools
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, Concatenate, Protocol

from exprl_megatron.config.stages import RlStage
from exprl_megatron.errors import RunStopped, ServerError, UserError
from exprl_megatron.judging.judgement import Judgement
from exprl_megatron.plugins.calling import described
from exprl_megatron.rollout.custom_stage import PromptProblem
from exprl_megatron.rollout.group import Group, StepInfo
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.runs.journal import SampledStep

CustomPrompts = Mapping[str, str]
"""The text of a prompt in place of a problem's statement, by the problem's id."""


class StepSampler(Protocol):
    """What samples and grades for a stage of the user's own: that of the run, or one without servers."""

    def shown_problems(self, stage: RlStage) -> Sequence[PromptProblem]:
        """The problems that the stage may sample."""

    def drawn_problems(self, stage: RlStage, first: int, count: int) -> list[PromptProblem]:
        """`count` problems in the stage's seeded order, from the place `first` on."""

    async def sample_problems(
        self, context: "StepContext", problem_ids: Sequence[str], group_size: int, prompts: CustomPrompts | None
    ) -> list[Group]:
        """Sample and grade; one group for each id, in their order."""

    async def sample_built_in(self, context: "StepContext") -> SampledStep:
        """Sample the step as the stage's base does, from the place `context.next_problem` on."""

    async def judgement_of(self, stage: RlStage, trace: Trace, by: str) -> Judgement:
        """The judgement on a trace by the `judge` or the `verifier`."""

    def log(self, text: str) -> None:
        """Print a line for the user."""


def _ending[**P, R](
    method: Callable[Concatenate["StepContext", P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate["StepContext", P], Coroutine[Any, Any, R]]:
    """Remember in `failure` what ends the run, so that user code that catches it does not continue."""

    @functools.wraps(method)
    async def call(self: "StepContext", *arguments: P.args, **named: P.kwargs) -> R:
        try:
            return await method(self, *arguments, **named)
        except (UserError, ServerError, RunStopped) as error:
            self.failure = error
            raise

    return call


class StepContext:
    """RolloutContext of a step."""

    def __init__(self, sampler: StepSampler, stage: Any, step: int, first: int, versions: Collection[str]):
        """`first` is the position of the step's first problem in the stage's order."""
        self.info = StepInfo(stage.name, step)
        self.stage: RlStage = stage
        self.versions = versions
        self.next_problem = first
        self.occurrences: Counter[int] = Counter()
        self.traces: list[Trace] = []
        """The sampled traces; an object is listed once for each group that has it."""
        self.failure: Exception | None = None
        self._sampler = sampler

    @functools.cached_property
    def problems(self) -> Sequence[PromptProblem]:
        """See RolloutContext.problems."""
        return tuple(self._sampler.shown_problems(self.stage))

    @functools.cached_property
    def _problem_of(self) -> dict[str, PromptProblem]:
        return {problem.id: problem for problem in self.problems}

    def next_problems(self, count: int | None = None) -> list[PromptProblem]:
        """See RolloutContext.next_problems."""
        wanted = self.stage.problems_per_step if count is None else count
        found = self._sampler.drawn_problems(self.stage, self.next_problem, wanted)
        self.next_problem += wanted
        return found

    @_ending
    async def sample(
        self,
        problems: Sequence[PromptProblem],
        group_size: int | None = None,
        prompt: Callable[[PromptProblem], str] | None = None,
    ) -> list[Group]:
        """See RolloutContext.sample.

        Raises:
            ValueError: a problem does not belong to the stage, there is no problem, or `group_size` is below 1.
        """
        ids = [problem.id for problem in problems]
        if unknown := [problem_id for problem_id in ids if problem_id not in self._problem_of]:
            raise ValueError(f"the stage has no problem {unknown[0]!r} to sample")
        if not ids:
            raise ValueError("sample was given no problem")
        size = self.stage.group_size if group_size is None else group_size
        if size < 1:
            raise ValueError(f"group_size is {size}; sample at least one trace of a problem")
        chosen = (self._problem_of[problem_id] for problem_id in ids)
        texts = None if prompt is None else {problem.id: _text(prompt, problem) for problem in chosen}
        return self._known(await self._sampler.sample_problems(self, ids, size, texts))

    @_ending
    async def sample_step(self) -> list[Group]:
        """See RolloutContext.sample_step."""
        sampled = await self._sampler.sample_built_in(self)
        self.next_problem += sampled.prompts_consumed
        return self._known(sampled.groups)

    @_ending
    async def verify(self, trace: Trace) -> Judgement:
        """See RolloutContext.verify.

        Raises:
            ValueError: the trace was not sampled in this step.
        """
        return await self._judgement(trace, "verifier")

    @_ending
    async def judge(self, trace: Trace) -> Judgement:
        """See RolloutContext.judge.

        Raises:
            ValueError: the trace was not sampled in this step, or the stage has no judge.
        """
        return await self._judgement(trace, "judge")

    def log(self, text: str) -> None:
        """See RolloutContext.log."""
        self._sampler.log(text)

    async def _judgement(self, trace: Trace, by: str) -> Judgement:
        if not any(trace is one for one in self.traces):
            raise ValueError("the trace was not sampled in this step")
        return await self._sampler.judgement_of(self.stage, trace, by)

    def _known(self, groups: list[Group]) -> list[Group]:
        self.traces += [sample.trace for group in groups for sample in group.samples]
        return groups


def _text(prompt: Callable[[PromptProblem], str], problem: PromptProblem) -> str:
    text = prompt(problem)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the prompt of problem {problem.id} is {described(text)}; return text")
    return text
