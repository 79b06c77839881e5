"""The conductor's side of a step: problems out, graded groups back."""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import Literal

from transformers import AutoTokenizer

from exprl_megatron.algorithms.advantages import informative
from exprl_megatron.algorithms.scores import group_scores
from exprl_megatron.config.problems import ProblemsConfig
from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.serving import SamplingConfig
from exprl_megatron.config.stages import JudgedStage, RlStage, SparseRlStage
from exprl_megatron.judging.leaks import LeakGuard
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.problems.order import problem_indices
from exprl_megatron.problems.prompts import PromptBuilder, PromptedProblems, check_vocabulary, drop_overlong
from exprl_megatron.problems.sources import load_problems
from exprl_megatron.rollout.group import GradedTrace, Group
from exprl_megatron.rollout.sampler import Prompt, sample_groups, sample_seed
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.runs.journal import Journal, SampledStep
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.fleet import Fleet
from exprl_megatron.serving.lent import LentServer
from exprl_megatron.serving.openai_endpoint import OpenAIEndpoint
from exprl_megatron.serving.ready import wait_ready
from exprl_megatron.training.console import Console
from exprl_megatron.training.grading import Grade
from exprl_megatron.training.judging_side import JudgingSide
from exprl_megatron.training.loop_lag import LoopLag
from exprl_megatron.utils.text_check import text_check_of
from exprl_megatron.utils.together import together

_ATTEND_S = 1.0


class Rollouts:
    """Samples, grades and journals; lives on rank 0, between `open` and `close`."""

    def __init__(
        self,
        config: RunConfig,
        journal: Journal,
        fleet: Fleet | None,
        judges: Sequence[SGLangClient | OpenAIEndpoint | LentServer],
        judging: JudgingSide,
        console: Console,
    ):
        self._config = config
        self._journal = journal
        self._fleet = fleet
        # Those that the fleet lends are opened and closed with it.
        self._judges = [judge for judge in judges if not isinstance(judge, LentServer)]
        self._lent = next((judge for judge in judges if isinstance(judge, LentServer)), None)
        self._judging = judging
        self._console = console
        self._tokenizer = AutoTokenizer.from_pretrained(config.policy.model)
        if fleet is not None and self._lent is None:
            fleet.text_check = text_check_of(self._tokenizer)
        self._prompted: dict[ProblemsConfig, PromptedProblems] = {}
        self._guards: dict[ProblemsConfig, LeakGuard] = {}
        self.loop_lag = LoopLag()

    async def open(self) -> None:
        """Open the connections and wait until every server is ready."""
        self.loop_lag.start()
        for judge in self._judges:
            await judge.__aenter__()
        await asyncio.gather(
            *([] if self._fleet is None else [self._fleet.open()]),
            *(wait_ready(client, self._config.judge.server.start_deadline_s) for client in self._judges),
        )

    async def close(self) -> None:
        """Close the connections and the judging side."""
        self.loop_lag.stop()
        if self._fleet is not None:
            await self._fleet.close()
        for judge in self._judges:
            await judge.__aexit__()
        self._judging.close()

    async def hold(self) -> None:
        """Let the traces under way wait, as `sync.hold` says, since the weights are about to change."""
        await self._fleet.hold(self._config.sync.hold)

    async def go_on(self) -> None:
        """Let them go on where they were, under the weights that the servers hold now."""
        await self._fleet.go_on()

    async def attend(self, work: Future) -> Literal["done", "weights", "nothing"]:
        """Wait a little for `work` of these rollouts; see Fleet.attend."""
        return await self._fleet.attend(work, _ATTEND_S)

    async def check_served(self) -> None:
        """See Fleet.check_served; a run without servers has nothing to ask."""
        if self._fleet is not None:
            await self._fleet.check_served()

    def prepare(self) -> None:
        """Read every problem and build every prompt that the run needs, so that bad input ends it at its start."""
        builder, model = PromptBuilder(self._tokenizer, self._config.prompt), self._config.policy.model
        for problems, sampling in self._config.problem_sets().items():
            room = self._config.policy.max_tokens - sampling.max_new_tokens
            limit = min(room, problems.max_prompt_tokens or room)
            prompted = drop_overlong(load_problems(problems), builder, limit)
            check_vocabulary(model, read_architecture(model).vocabulary, prompted.prompts)
            self._prompted[problems] = prompted
            self._guards[problems] = LeakGuard(self._config.leak_guard, prompted.problems)
            if prompted.dropped:
                self._console.say(f"{problems.source}: {prompted.dropped} prompts of more than {limit} tokens left out")

    def problem_count(self, problems: ProblemsConfig) -> int:
        """How many problems of the set have prompts that fit."""
        return len(self._prompted[problems])

    def recall(self, stage: RlStage, step: int) -> SampledStep | None:
        """The step from the journal, or None where it was never sampled to its end."""
        return self._journal.read(stage.name, step)

    def has_sampled(self, stage: RlStage, step: int) -> bool:
        """Whether the journal has the step."""
        return self._journal.has(stage.name, step)

    def forget(self, stage: RlStage, step: int) -> None:
        """Delete what `journal.keep_steps` does not keep, now that a checkpoint has step `step`.

        A journal that belongs to another run (debug.rollouts) stays as it is.
        """
        count = self._config.journal.keep_steps
        if count is not None and self._config.debug.rollouts is None:
            self._journal.keep_newest(stage.name, step, count)

    async def collect(self, stage: RlStage, step: int, drawn: int, versions: Collection[str]) -> SampledStep:
        """Sample and grade the next problems after the first `drawn`, and put them into the journal.

        Every token must come from weights among `versions` (see sample_groups). Raises ServerError, or RunStopped where
        the judge fails its gate or more judgements than the config allows are abstentions.
        """
        await self._judging.check_judge(stage, step)
        sampled = await self._sampled(stage, step, drawn, versions)
        self._judging.check_abstentions(stage, step, sampled.groups)
        # In a thread: other steps' requests, judge deadlines and the watch over servers go on meanwhile.
        await asyncio.to_thread(self._journal.write, stage.name, step, sampled)
        return sampled

    async def _sampled(self, stage: RlStage, step: int, drawn: int, versions: Collection[str]) -> SampledStep:
        """The step's groups; dynamic sampling replaces those that teach nothing, as long as rounds are left."""
        grade = self._judging.grade(stage, self._tokenizer)
        count = len(self._prompted[stage.problems])
        wanted = stage.problems_per_step
        rounds = stage.dynamic_sampling if isinstance(stage, SparseRlStage) else None

        def counts(group: Group) -> bool:
            return rounds is None or _teaches(stage, group)

        groups: list[Group] = []
        dull: list[Group] = []
        next_problem = drawn
        seen: Counter[int] = Counter()
        for _ in range(1 + (rounds or 0)):
            missing = wanted - len(groups)
            draws = stage.drawn_for(missing)
            indices = problem_indices(self._config.seed, stage.name, next_problem, draws, count)
            next_problem += draws
            sampled = await self.sample(
                (stage.name, step),
                stage.problems,
                indices,
                stage.group_size,
                stage.sampling,
                versions,
                grade,
                wanted=missing,
                counts=counts,
                judged=isinstance(stage, JudgedStage),
                seen=seen,
            )
            for group in sampled:
                (groups if counts(group) else dull).append(group)
            if len(groups) >= wanted:
                break
        # Where too few can be found, dull groups fill the step: its size, and so its place in the data, is kept.
        groups = (groups + dull)[:wanted]
        return SampledStep(groups, next_problem - drawn, self._judging.take_counts())

    async def sample(
        self,
        purpose: tuple[str, int],
        problems: ProblemsConfig,
        indices: Sequence[int],
        group_size: int,
        sampling: SamplingConfig,
        versions: Collection[str],
        grade: Grade,
        *,
        wanted: int | None = None,
        counts: Callable[[Group], bool] = lambda group: True,
        judged: bool = False,
        seen: Counter[int] | None = None,
    ) -> list[Group]:
        """`group_size` graded traces for each of the problems at `indices`, in that order.

        Where `wanted` is given, only of those that were through when so many groups counted. A trace is graded as soon
        as it is finished (with `server.group_requests`, as its group is), or when all are, where it is `judged` and the
        judge waits for these servers. `purpose` (stage and step) is shown and seeds the samples; `seen` counts how
        often each problem was drawn for it, so that copies of a problem in a step are sampled differently. Raises
        RunStopped before anything is sent where a prompt holds a piece of its problem's reference.
        """
        prompted, guard = self._prompted[problems], self._guards[problems]
        by_id = {prompted.problems[i].id: prompted.problems[i] for i in indices}
        seen = Counter() if seen is None else seen
        prompts = []
        for i in indices:
            prompts.append(Prompt(prompted.problems[i].id, prompted.prompts[i], seen[i]))
            seen[i] += 1
        await asyncio.to_thread(self._check_prompts, guard, prompts)
        graded: dict[Trace, GradedTrace] = {}
        later = judged and self._lent is not None
        with self._console.rollouts(*purpose, len(prompts) * group_size) as bar:

            async def take(trace: Trace) -> None:
                bar.sampled()
                if guard.watches_traces:
                    await asyncio.to_thread(guard.check_trace, trace.problem_id, trace.text)
                if not later:
                    await grade_one(trace)

            async def grade_one(trace: Trace) -> None:
                graded[trace] = await grade(by_id[trace.problem_id], trace)
                bar.graded()

            def group_of(traces: list[Trace]) -> Group:
                problem = by_id[traces[0].problem_id]
                return Group(problem.id, tuple(graded[trace] for trace in traces), problem.domain)

            found = await sample_groups(
                self._fleet,
                prompts,
                group_size,
                sampling,
                lambda problem_id, k: sample_seed(self._config.seed, *purpose, problem_id, k),
                weight_versions=versions,
                on_trace=take,
                wanted=wanted,
                counts=lambda traces: later or counts(group_of(traces)),
                whole_groups=self._config.server.group_requests,
            )
            if later:
                await self._lent.bring()
                await together(grade_one(trace) for traces in found for trace in traces)
        return [group_of(traces) for traces in found]

    def _check_prompts(self, guard: LeakGuard, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            guard.check_request(prompt.problem_id, self._tokenizer.decode(prompt.token_ids.tolist()))


def _teaches(stage: SparseRlStage, group: Group) -> bool:
    """Whether the group's scores differ, so that some trace of it gets an advantage."""
    judgements = [member.judgement for member in group.members]
    overlong = [member.trace.overlong for member in group.members]
    return bool(informative(*group_scores(judgements, overlong, stage.overlong)))
