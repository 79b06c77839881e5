"""Samples and grades the traces of a step, as the stage's config says or as the user's own stage requests."""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from exprl_megatron.algorithms.advantages import has_variance
from exprl_megatron.config.stages import JudgedStage, RlStage, SparseRlStage
from exprl_megatron.judging.judgement import Judgement
from exprl_megatron.models.routing import Routing
from exprl_megatron.rollout.custom_stage import PromptProblem
from exprl_megatron.rollout.group import Group
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.runs.journal import SampledStep
from exprl_megatron.training.custom_rollouts import CustomPrompts, StepContext
from exprl_megatron.training.graded_sampling import GradedSampler, SamplePlan
from exprl_megatron.training.judging_runtime import JudgingRuntime
from exprl_megatron.training.run_logger import RunLogger
from exprl_megatron.training.run_problems import RunProblems
from exprl_megatron.training.sample_rewards import group_rewards


class RunStepSampler:
    """StepSampler of a run.

    Args:
        problems: the run's problems, with their prompts.
        sampler: samples and grades.
        judging: grades the traces of each stage.
        tokenizer: the policy's.
        routing: the policy's, where the experts that the servers choose are wanted.
        logger: prints lines for the user.
    """

    def __init__(
        self,
        problems: RunProblems,
        sampler: GradedSampler,
        judging: JudgingRuntime,
        tokenizer: Any,
        routing: Routing | None,
        logger: RunLogger,
    ):
        self._problems = problems
        self._sampler = sampler
        self._judging = judging
        self._tokenizer = tokenizer
        self._routing = routing
        self._logger = logger

    async def sample_step(
        self, stage: RlStage, step: int, prompts_consumed: int, versions: Collection[str]
    ) -> SampledStep:
        """Sample the step's groups; dynamic sampling replaces zero-variance groups as long as rounds are left.

        Arguments and errors are those of Rollouts.collect.
        """
        grade = self._judging.grade(stage, self._tokenizer)
        target_groups = stage.problems_per_step
        rounds = stage.dynamic_sampling if isinstance(stage, SparseRlStage) else None

        def accept(group: Group) -> bool:
            return rounds is None or _has_variance(stage, group)

        groups: list[Group] = []
        zero_variance: list[Group] = []
        next_problem = prompts_consumed
        occurrences: Counter[int] = Counter()
        for _ in range(1 + (rounds or 0)):
            missing = target_groups - len(groups)
            draws = stage.prompts_for(missing)
            indices = self._problems.indices(stage, next_problem, draws)
            next_problem += draws
            purpose = (stage.name, step)
            sampled = await self._sampler.sample(
                SamplePlan(purpose, stage.problems, indices, stage.group_size, stage.sampling, versions, self._routing),
                grade,
                target_groups=missing,
                accept_fn=accept,
                judged=isinstance(stage, JudgedStage),
                occurrences=occurrences,
            )
            for group in sampled:
                (groups if accept(group) else zero_variance).append(group)
            if len(groups) >= target_groups:
                break
        # Where too few groups have variance, zero-variance groups fill the step, so that every step has one size.
        groups = (groups + zero_variance)[:target_groups]
        return SampledStep(groups, next_problem - prompts_consumed, self._judging.take_counts())

    def shown_problems(self, stage: RlStage) -> Sequence[PromptProblem]:
        """See RunProblems.shown."""
        return self._problems.shown(stage)

    def drawn_problems(self, stage: RlStage, first: int, count: int) -> list[PromptProblem]:
        """See RunProblems.drawn."""
        return self._problems.drawn(stage, first, count)

    async def sample_problems(
        self, context: StepContext, problem_ids: Sequence[str], group_size: int, prompts: CustomPrompts | None
    ) -> list[Group]:
        """Sample and grade traces of problems that the user's code chose; one group for each id.

        Raises:
            UserError: a text of `prompts` is too long, or would not reach the policy unchanged.
        """
        stage = context.stage
        index_of = self._problems.index_of(stage)
        custom = None
        if prompts is not None:
            custom = {index_of[id]: self._problems.custom_prompt(stage, id, text) for id, text in prompts.items()}
        plan = SamplePlan(
            (stage.name, context.info.step),
            stage.problems,
            [index_of[problem_id] for problem_id in problem_ids],
            group_size,
            stage.sampling,
            context.versions,
            self._routing,
            custom,
        )
        grade = self._judging.grade(stage, self._tokenizer)
        judged = isinstance(stage, JudgedStage)
        return await self._sampler.sample(plan, grade, judged=judged, occurrences=context.occurrences)

    async def sample_built_in(self, context: StepContext) -> SampledStep:
        """Sample and grade a step as the base of the user's stage does."""
        return await self.sample_step(context.stage, context.info.step, context.next_problem, context.versions)

    async def judgement_of(self, stage: RlStage, trace: Trace, by: str) -> Judgement:
        """Return the judgement on a trace by the `judge` or the `verifier`."""
        return await self._judging.judgement_of(self._problems.problem(stage, trace.problem_id), trace, by)

    def log(self, text: str) -> None:
        """Print a line for the user."""
        self._logger.log(text)


def _has_variance(stage: SparseRlStage, group: Group) -> bool:
    """Whether the rewards of the group differ, so that its advantages are not all 0."""
    return bool(has_variance(*group_rewards(group, stage.overlong)))
