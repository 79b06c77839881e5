"""Rank 0's part of a step: samples traces of the step's problems, has them graded, and logs the graded groups."""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from exprl_megatron.algorithms.advantages import has_variance
from exprl_megatron.config.problems import ProblemsConfig
from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.serving import SamplingConfig
from exprl_megatron.config.stages import JudgedStage, RlStage, SparseRlStage
from exprl_megatron.errors import UserError
from exprl_megatron.judging.judgement import Judgement
from exprl_megatron.judging.leaks import LeakGuard
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.models.routing import Routing
from exprl_megatron.models.tokenizer import load_tokenizer
from exprl_megatron.problems.needs import count_shared
from exprl_megatron.problems.order import problem_indices
from exprl_megatron.problems.prompts import PromptBuilder, PromptedProblems, check_vocabulary, drop_overlong
from exprl_megatron.problems.sources import load_problems
from exprl_megatron.rollout.custom_stage import PromptProblem
from exprl_megatron.rollout.group import GradedTrace, Group
from exprl_megatron.rollout.sampler import Prompt, sample_groups, sample_seed
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.runs.journal import Journal, SampledStep
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.openai_endpoint import OpenAIEndpoint
from exprl_megatron.serving.ready import wait_ready
from exprl_megatron.serving.server_pool import ServerPool
from exprl_megatron.serving.shared_judge import SharedJudgeClient
from exprl_megatron.training.custom_rollouts import CustomPrompts, StepContext
from exprl_megatron.training.custom_stages import StageHooks, read_kept, write_kept
from exprl_megatron.training.grading import GradeTrace
from exprl_megatron.training.judging_runtime import JudgingRuntime
from exprl_megatron.training.loop_lag import LoopLag
from exprl_megatron.training.run_logger import RunLogger
from exprl_megatron.training.sample_rewards import group_rewards
from exprl_megatron.utils.text_check import text_check_of
from exprl_megatron.utils.together import gather_or_cancel

_POLL_S = 1.0


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


class Rollouts:
    """Samples and grades traces and writes them to the rollout log; exists on rank 0, between `open` and `close`."""

    def __init__(
        self,
        config: RunConfig,
        journal: Journal,
        pool: ServerPool | None,
        judges: Sequence[SGLangClient | OpenAIEndpoint | SharedJudgeClient],
        judging: JudgingRuntime,
        logger: RunLogger,
        custom_stages: Mapping[str, StageHooks] = MappingProxyType({}),
    ):
        self._config = config
        self._custom_stages = custom_stages
        self._kept = RunDirectory(config.directory).kept_problems
        self._choices: dict[str, Sequence[int]] = {}
        self._journal = journal
        self._pool = pool
        # Judges on the policy's servers are opened and closed with the pool.
        self._judges = [judge for judge in judges if not isinstance(judge, SharedJudgeClient)]
        self._shared_judge = next((judge for judge in judges if isinstance(judge, SharedJudgeClient)), None)
        self._judging = judging
        self._logger = logger
        self._tokenizer = load_tokenizer(config.policy.model)
        if pool is not None and self._shared_judge is None:
            pool.text_check = text_check_of(self._tokenizer)
        replays = config.policy.router_replay
        self._routing = Routing.of(read_architecture(config.policy.model)) if replays else None
        self._prompted: dict[ProblemsConfig, PromptedProblems] = {}
        self._guards: dict[ProblemsConfig, LeakGuard] = {}
        self.loop_lag = LoopLag()

    async def open(self) -> None:
        """Open the connections and wait until every server is ready.

        Raises:
            ServerError: a server does not start.
        """
        self.loop_lag.start()
        for judge in self._judges:
            await judge.__aenter__()
        await asyncio.gather(
            *([] if self._pool is None else [self._pool.open()]),
            *(wait_ready(client, self._config.judge.server.start_deadline_s) for client in self._judges),
        )

    async def close(self) -> None:
        """Close the connections to the servers and the judge."""
        self.loop_lag.stop()
        if self._pool is not None:
            await self._pool.close()
        for judge in self._judges:
            await judge.__aexit__()
        self._judging.close()

    async def pause_generation(self) -> None:
        """Pause the traces in flight before an update of the weights, in the mode `sync.pause_mode`."""
        await self._pool.pause_generation(self._config.sync.pause_mode)

    async def continue_generation(self) -> None:
        """Continue the paused traces where they were, under the weights that the servers have now."""
        await self._pool.continue_generation()

    async def wait_for(self, work: Future) -> Literal["done", "weights", "nothing"]:
        """Wait up to a second for `work` of these rollouts; see ServerPool.wait_for."""
        return await self._pool.wait_for(work, _POLL_S)

    async def check_served(self) -> None:
        """Check the weights of newly registered servers (see ServerPool.check_served); does nothing without servers."""
        if self._pool is not None:
            await self._pool.check_served()

    def prepare(self) -> None:
        """Read every problem and build every prompt of the run, so that bad input stops the run at its start.

        Raises:
            UserError: a problem or a prompt cannot be used.
        """
        builder, model = PromptBuilder(self._tokenizer, self._config.prompt), self._config.policy.model
        for problems, sampling in self._config.problem_sets().items():
            room = self._config.policy.max_tokens - sampling.max_new_tokens
            limit = min(room, problems.max_prompt_tokens or room)
            prompted = drop_overlong(load_problems(problems), builder, limit)
            check_vocabulary(model, read_architecture(model).vocabulary, prompted.prompts)
            self._prompted[problems] = prompted
            self._guards[problems] = LeakGuard(self._config.leak_guard, prompted.problems)
            if prompted.dropped:
                self._logger.log(f"{problems.source}: {prompted.dropped} prompts of more than {limit} tokens left out")
        self._log_shared()

    def _log_shared(self) -> None:
        """Log how many held-out problems the policy is also trained on."""
        if not self._config.has_evaluation:
            return
        held_out = self._prompted[self._config.required_evaluation.problems].problems
        trained = {stage.problems for stage in self._config.stages if isinstance(stage, RlStage)}
        for source, shared in sorted((p.source, count_shared(held_out, self._prompted[p].problems)) for p in trained):
            if shared:
                self._logger.log(
                    f"{shared} of {len(held_out)} problems of the evaluation are also in {source}, which is for "
                    "training: pass@k includes what the policy has seen"
                )

    def take_metrics(self, stage: str, step: int) -> dict[str, float]:
        """Return `gate/*` of a step whose judge was checked, and `servers/*` and `loop/*` since the last call."""
        servers = {} if self._pool is None else self._pool.take_metrics()
        lag = {"loop/lag_max_s": self.loop_lag.take()}
        return self._judging.take_gate_metrics(stage, step) | servers | lag

    def problem_count(self, problems: ProblemsConfig) -> int:
        """Number of problems of the set whose prompts fit into the context."""
        return len(self._prompted[problems])

    def problem_texts(self, stage: RlStage) -> Callable[[str], str]:
        """Return a function from a problem's id to its text; the empty text where the stage has no such problem."""
        problems = self._prompted[stage.problems].problems
        return lambda problem_id: next((p.statement for p in problems if p.id == problem_id), "")

    def read_logged(self, stage: RlStage, step: int) -> SampledStep | None:
        """Read a step from the rollout log; None where the log has no complete record of it.

        Raises:
            UserError: the log is damaged; or router replay is on, and the log has no experts or those of another model.
        """
        sampled = self._journal.read(stage.name, step)
        if sampled is not None and self._routing is not None:
            _check_routed(sampled, self._routing, self._journal.path(stage.name, step))
        return sampled

    def has_sampled(self, stage: RlStage, step: int) -> bool:
        """Whether the rollout log has the step."""
        return self._journal.has(stage.name, step)

    def prune_log(self, stage: RlStage, step: int) -> None:
        """Delete the steps that `journal.keep_steps` does not keep, after a checkpoint of step `step`.

        The rollout log of another run (debug.rollouts) is not changed.
        """
        count = self._config.journal.keep_steps
        if count is not None and self._config.debug.rollouts is None:
            self._journal.keep_newest(stage.name, step, count)

    async def collect(self, stage: RlStage, step: int, prompts_consumed: int, versions: Collection[str]) -> SampledStep:
        """Sample and grade one step and write it to the rollout log.

        Args:
            stage: the stage.
            step: number of the step in the stage, from 1.
            prompts_consumed: number of the stage's problems that earlier steps have sampled.
            versions: every token must come from one of these weight versions (see sample_groups).

        Raises:
            ServerError: a server fails, and the request cannot be repeated elsewhere.
            RunStopped: the judge fails its gate, too many judgements are abstentions, or a reference leaks.
        """
        await self._judging.check_judge(stage, step)
        hooks = self._custom_stages.get(stage.name)
        if hooks is not None and hooks.samples:
            context = StepContext(self, stage, step, prompts_consumed, versions)
            groups = await hooks.rollout(context)
            consumed = context.next_problem - prompts_consumed
            sampled = SampledStep(groups, consumed, self._judging.take_counts())
        else:
            sampled = await self._sampled(stage, step, prompts_consumed, versions)
        self._judging.check_abstentions(stage, step, sampled.groups)
        # In a thread, so that other steps' requests, judge deadlines and health checks continue in the meantime.
        await asyncio.to_thread(self._journal.write, stage.name, step, sampled)
        return sampled

    async def _sampled(
        self, stage: RlStage, step: int, prompts_consumed: int, versions: Collection[str]
    ) -> SampledStep:
        """Sample the step's groups; dynamic sampling replaces zero-variance groups as long as rounds are left."""
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
            indices = self._drawn(stage, next_problem, draws)
            next_problem += draws
            purpose = (stage.name, step)
            sampled = await self.sample(
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

    def custom_stage(self, stage: RlStage) -> StageHooks:
        """The hooks of a stage of the user's own."""
        return self._custom_stages[stage.name]

    def write_kept_problems(self, stage: RlStage) -> None:
        """Write the problems that a stage of the user selects for later stages, if it selects any."""
        kept = self._custom_stages[stage.name].kept_problems([problem.id for problem in self.shown_problems(stage)])
        if kept is not None:
            write_kept(self._kept, stage.name, kept)

    def shown_problems(self, stage: RlStage) -> Sequence[PromptProblem]:
        """Return the parts that the policy may read of the problems that the stage may sample.

        Raises:
            UserError: the stage depends on an earlier one that selected no problem.
        """
        problems = self._prompted[stage.problems].problems
        found = (problems[i] for i in self._choice(stage))
        return [PromptProblem(problem.id, problem.statement, problem.domain) for problem in found]

    def drawn_problems(self, stage: RlStage, first: int, count: int) -> list[PromptProblem]:
        """Return the same parts of the `count` problems from position `first` of the stage's order."""
        problems = self._prompted[stage.problems].problems
        found = (problems[i] for i in self._drawn(stage, first, count))
        return [PromptProblem(problem.id, problem.statement, problem.domain) for problem in found]

    async def sample_problems(
        self, context: StepContext, problem_ids: Sequence[str], group_size: int, prompts: CustomPrompts | None
    ) -> list[Group]:
        """Sample and grade traces of problems that the user's code chose; one group for each id.

        Raises:
            UserError: a text of `prompts` is too long, or would not reach the policy unchanged.
        """
        stage = context.stage
        places = {problem.id: i for i, problem in enumerate(self._prompted[stage.problems].problems)}
        custom = None
        if prompts is not None:
            custom = {places[id]: self._custom_prompt(stage, id, text) for id, text in prompts.items()}
        plan = SamplePlan(
            (stage.name, context.info.step),
            stage.problems,
            [places[problem_id] for problem_id in problem_ids],
            group_size,
            stage.sampling,
            context.versions,
            self._routing,
            custom,
        )
        grade = self._judging.grade(stage, self._tokenizer)
        judged = isinstance(stage, JudgedStage)
        return await self.sample(plan, grade, judged=judged, occurrences=context.occurrences)

    async def sample_built_in(self, context: StepContext) -> SampledStep:
        """Sample and grade a step as the base of the user's stage does."""
        return await self._sampled(context.stage, context.info.step, context.next_problem, context.versions)

    async def judgement_of(self, stage: RlStage, trace: Trace, by: str) -> Judgement:
        """Return the judgement on a trace by the `judge` or the `verifier`."""
        problems = self._prompted[stage.problems].problems
        problem = next(problem for problem in problems if problem.id == trace.problem_id)
        return await self._judging.judgement_of(problem, trace, by)

    def log(self, text: str) -> None:
        """Print a line for the user."""
        self._logger.log(text)

    def _custom_prompt(self, stage: RlStage, problem_id: str, text: str) -> tuple[int, ...]:
        builder = PromptBuilder(self._tokenizer, self._config.prompt)
        if (fault := builder.fault(text)) is not None:
            raise UserError(f"stage {stage.name}: the prompt of its own code for problem {problem_id} {fault}")
        ids, room = builder.token_ids(text), self._config.policy.max_tokens - stage.sampling.max_new_tokens
        if len(ids) > room:
            raise UserError(
                f"stage {stage.name}: the prompt of its own code for problem {problem_id} has {len(ids)} tokens, but "
                f"policy.max_tokens leaves room for {room}; shorten it, or raise the limit."
            )
        return ids

    def _choice(self, stage: RlStage) -> Sequence[int]:
        """The indices of the problems that the stage may sample."""
        if stage.name not in self._choices:
            problems, every = self._prompted[stage.problems].problems, range(len(self._prompted[stage.problems]))
            kept = None if stage.problems_from is None else read_kept(self._kept, stage.problems_from)
            found = every if kept is None else [i for i in every if problems[i].id in kept]
            if not found:
                raise UserError(
                    f"Stage {stage.name} has none of the problems that stage {stage.problems_from} kept; give both the "
                    "same `problems`."
                )
            self._choices[stage.name] = found
        return self._choices[stage.name]

    def _drawn(self, stage: RlStage, first: int, count: int) -> list[int]:
        choice = self._choice(stage)
        return [choice[i] for i in problem_indices(self._config.seed, stage.name, first, count, len(choice))]

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
        prompted, guard = self._prompted[plan.problems], self._guards[plan.problems]
        by_id = {prompted.problems[i].id: prompted.problems[i] for i in plan.indices}
        occurrences = Counter() if occurrences is None else occurrences
        prompts = []
        for i in plan.indices:
            token_ids = prompted.prompts[i] if plan.custom_prompts is None else plan.custom_prompts[i]
            prompts.append(Prompt(prompted.problems[i].id, token_ids, occurrences[i]))
            occurrences[i] += 1
        check = guard.check_request if plan.custom_prompts is None else guard.check_custom_prompt
        await asyncio.to_thread(self._check_prompts, check, prompts)
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

    def _check_prompts(self, check: Callable[[str, str], None], prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            check(prompt.problem_id, self._tokenizer.decode(prompt.token_ids.tolist()))


def _check_routed(sampled: SampledStep, routing: Routing, path: Path) -> None:
    found = [sample.trace.routed_experts for group in sampled.groups for sample in group.samples]
    for experts in found:
        if experts is None:
            raise UserError(
                f"The journal file {path} has no routed experts: it was sampled without policy.router_replay; set the "
                f"key to false, or sample again."
            )
        layers, top_k = experts.shape[1:]
        largest = int(experts.max(initial=0))
        if (layers, top_k) != (routing.layers, routing.top_k) or largest >= routing.experts:
            raise UserError(
                f"The journal file {path} has the routed experts of another model: {top_k} of at least {largest + 1} "
                f"experts in each of {layers} layers, where policy.model has {routing.top_k} of {routing.experts} in "
                f"each of {routing.layers}; set policy.router_replay to false, or policy.model to the model that "
                f"sampled the traces."
            )


def _has_variance(stage: SparseRlStage, group: Group) -> bool:
    """Whether the rewards of the group differ, so that its advantages are not all 0."""
    return bool(has_variance(*group_rewards(group, stage.overlong)))
