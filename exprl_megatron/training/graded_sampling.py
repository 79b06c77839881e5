"""Samples the traces of problems and has each graded as soon as it is finished."""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exprl_megatron.config.problems import ProblemsConfig
from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.serving import SamplingConfig
from exprl_megatron.models.routing import Routing
from exprl_megatron.problems.prompts import PromptedProblems
from exprl_megatron.rollout.group import GradedTrace, Group
from exprl_megatron.rollout.sampler import Prompt, sample_groups, sample_seed
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.serving.server_pool import ServerPool
from exprl_megatron.serving.shared_judge import SharedJudgeClient
from exprl_megatron.training.grading import GradeTrace
from exprl_megatron.training.run_logger import RunLogger
from exprl_megatron.training.run_problems import RunProblems
from exprl_megatron.utils.together import gather_or_cancel


@dataclass(frozen=True)
class SamplePlan:
    """The traces to sample: `group_size` of each problem at `indices`."""

    purpose: tuple[str, int]
    """Stage and step, which are displayed and determine the seeds of the samples."""
    problems: ProblemsConfig
    indices: Sequence[int]
    group_size: int
    sampling: SamplingConfig
    versions: Collection[str]
    """The weight versions that may sample them (see sample_groups)."""
    routing: Routing | None = None
    """Of the policy, where the experts that the servers choose are wanted."""
    custom_prompts: Mapping[int, tuple[int, ...]] | None = None
    """Token ids of prompts that the user's own code wrote, in place of the problems' own, by index."""


class GradedSampler:
    """Samples on the servers of `pool`, under the run's leak guards; exists on rank 0.

    Args:
        config: the config of the run.
        problems: the run's problems, with their prompts.
        tokenizer: the policy's.
        pool: the servers that sample; None where the run samples nothing.
        shared_judge: a judge on the servers of `pool`, if the run has one.
        logger: shows the progress.
    """

    def __init__(
        self,
        config: RunConfig,
        problems: RunProblems,
        tokenizer: Any,
        pool: ServerPool | None,
        shared_judge: SharedJudgeClient | None,
        logger: RunLogger,
    ):
        self._config = config
        self._problems = problems
        self._tokenizer = tokenizer
        self._pool = pool
        self._shared_judge = shared_judge
        self._logger = logger

    async def sample(
        self,
        plan: SamplePlan,
        grade: GradeTrace,
        *,
        target_groups: int | None = None,
        accept_fn: Callable[[Group], bool] = lambda group: True,
        judged: bool = False,
        occurrences: Counter[int] | None = None,
    ) -> list[Group]:
        """Sample the traces of `plan` and grade them; one group per problem, in the order of its indices.

        Where `target_groups` is given, sampling ends when `accept_fn` has accepted that many groups, and unfinished
        groups are left out. A trace is graded as soon as it is finished (with `server.group_requests`, as soon as its
        group is finished); where it is `judged` by the policy's own servers, it is graded after all sampling.
        `occurrences` counts how often each problem was drawn for the plan's purpose, so that copies of a problem in a
        step have different seeds.

        Raises:
            RunStopped: a prompt contains a part of its problem's reference; no request has been sent then.
            ServerError: see sample_groups.
        """
        prompted, guard = self._problems.prompted[plan.problems], self._problems.guards[plan.problems]
        by_id = {prompted.problems[i].id: prompted.problems[i] for i in plan.indices}
        prompts = _prompts(plan, prompted, Counter() if occurrences is None else occurrences)
        await self._check_prompts(plan, prompts)
        graded: dict[Trace, GradedTrace] = {}
        grade_after_sampling = judged and self._shared_judge is not None
        with self._logger.rollouts(*plan.purpose, len(prompts) * plan.group_size) as bar:

            async def on_trace(trace: Trace) -> None:
                bar.sampled()
                if guard.checks_traces:
                    await asyncio.to_thread(guard.check_trace, trace.problem_id, trace.text)
                if not grade_after_sampling:
                    await grade_one(trace)

            async def grade_one(trace: Trace) -> None:
                graded[trace] = await grade(by_id[trace.problem_id], trace)
                bar.graded()

            def group_of(traces: list[Trace]) -> Group:
                problem = by_id[traces[0].problem_id]
                return Group(problem.id, tuple(graded[trace] for trace in traces), problem.domain)

            found = await sample_groups(
                self._pool,
                prompts,
                plan.group_size,
                plan.sampling,
                lambda problem_id, k: sample_seed(self._config.seed, *plan.purpose, problem_id, k),
                weight_versions=plan.versions,
                on_trace=on_trace,
                target_groups=target_groups,
                accept_fn=lambda traces: grade_after_sampling or accept_fn(group_of(traces)),
                group_requests=self._config.server.group_requests,
                routing=plan.routing,
            )
            if grade_after_sampling:
                await self._shared_judge.load_weights()
                await gather_or_cancel(grade_one(trace) for traces in found for trace in traces)
        return [group_of(traces) for traces in found]

    async def _check_prompts(self, plan: SamplePlan, prompts: Sequence[Prompt]) -> None:
        """Compare the prompts with references, outside of the event loop."""
        guard = self._problems.guards[plan.problems]
        check = guard.check_request if plan.custom_prompts is None else guard.check_custom_prompt

        def check_all() -> None:
            for prompt in prompts:
                check(prompt.problem_id, self._tokenizer.decode(prompt.token_ids.tolist()))

        await asyncio.to_thread(check_all)


def _prompts(plan: SamplePlan, prompted: PromptedProblems, occurrences: Counter[int]) -> list[Prompt]:
    """Return the prompts of `plan` in the order of its indices, and count each problem in `occurrences`."""
    prompts = []
    for i in plan.indices:
        token_ids = prompted.prompts[i] if plan.custom_prompts is None else plan.custom_prompts[i]
        prompts.append(Prompt(prompted.problems[i].id, token_ids, occurrences[i]))
        occurrences[i] += 1
    return prompts
