"""The conductor's side of a step: problems out, graded groups back."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from transformers import AutoTokenizer

from exprl_megatron.config.problems import ProblemsConfig
from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.serving import SamplingConfig
from exprl_megatron.config.stages import ExprlOutcomeStage, RlStage
from exprl_megatron.errors import ServerError, UserError
from exprl_megatron.judging.abstentions import check_abstention_rate
from exprl_megatron.judging.judge import Judge
from exprl_megatron.judging.judgement import Judgement
from exprl_megatron.policy.architecture import read_architecture
from exprl_megatron.problems.order import problem_indices
from exprl_megatron.problems.problem import Problem
from exprl_megatron.problems.prompts import PromptBuilder, PromptedProblems, drop_overlong
from exprl_megatron.problems.sources import load_problems
from exprl_megatron.rewards.math_answer import MathVerifier
from exprl_megatron.rollout.group import GradedTrace, Group
from exprl_megatron.rollout.sampler import Prompt, sample_groups, sample_seed
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.training.conductor import Conductor
from exprl_megatron.training.console import Console
from exprl_megatron.training.journal import Journal

Grade = Callable[[Problem, Trace], Awaitable[Judgement]]
_HEALTH_POLL_S = 0.5


class Rollouts:
    """Samples, grades and journals; lives on rank 0, between `open` and `close`."""

    def __init__(
        self,
        config: RunConfig,
        journal: Journal,
        conductor: Conductor,
        clients: Sequence[SGLangClient],
        judges: Sequence[SGLangClient],
        console: Console,
    ):
        self._config = config
        self._journal = journal
        self._conductor = conductor
        self._clients = clients
        self._judges = judges
        self._console = console
        self._prompted: dict[ProblemsConfig, PromptedProblems] = {}
        self._judge: Judge | None = None
        self._verifier = MathVerifier() if config.samples else None

    async def open(self) -> None:
        """Open the connections and wait until every server is ready."""
        for client in (*self._clients, *self._judges):
            await client.__aenter__()
        await asyncio.gather(
            *(_ready(client, self._config.server.start_deadline_s) for client in self._clients),
            *(_ready(client, self._config.judge.server.start_deadline_s) for client in self._judges),
        )

    async def close(self) -> None:
        """Close the connections and end the verifier's processes."""
        for client in (*self._clients, *self._judges):
            await client.__aexit__()
        if self._verifier is not None:
            self._verifier.close()

    def prepare(self) -> None:
        """Read every problem and build every prompt that the run needs, so that bad input ends it at its start."""
        builder = PromptBuilder(AutoTokenizer.from_pretrained(self._config.policy.model), self._config.prompt)
        for problems, sampling in self._config.problem_sets().items():
            room = self._config.policy.max_tokens - sampling.max_new_tokens
            limit = min(room, problems.max_prompt_tokens or room)
            prompted = drop_overlong(load_problems(problems), builder, limit)
            _check_vocabulary(self._config.policy.model, prompted)
            self._prompted[problems] = prompted
            if prompted.dropped:
                self._console.say(f"{problems.source}: {prompted.dropped} prompts of more than {limit} tokens left out")
        if self._config.judges:
            judge_tokenizer = AutoTokenizer.from_pretrained(self._config.judge.model)
            self._judge = Judge(self._config.judge, self._judges, judge_tokenizer)

    def problem_count(self, problems: ProblemsConfig) -> int:
        """How many problems of the set have prompts that fit."""
        return len(self._prompted[problems])

    def recall(self, stage: RlStage, step: int) -> list[Group] | None:
        """The step's groups from the journal, or None where it was never sampled to its end."""
        return self._journal.read(stage.name, step)

    def collect(self, stage: RlStage, step: int, drawn: int, version: str) -> list[Group]:
        """Sample and grade the next problems after the first `drawn`, and put them into the journal.

        Every trace must come from the weights `version`. Raises ServerError, or RunStopped where more
        judgements than the config allows are abstentions.
        """
        count = len(self._prompted[stage.problems])
        indices = problem_indices(self._config.seed, stage.name, drawn, stage.problems_per_step, count)
        if isinstance(stage, ExprlOutcomeStage):
            judge, bound = self._judge, self._config.judge.max_abstention_rate

            def grade(problem: Problem, trace: Trace) -> Awaitable[Judgement]:
                return judge.grade(problem, trace.text)

        else:
            grade, bound = self.verifier(stage.verifier_deadline_s), stage.max_abstention_rate
        purpose = (stage.name, step)
        groups = self.sample(purpose, stage.problems, indices, stage.group_size, stage.sampling, version, grade)
        judgements = [member.judgement for group in groups for member in group.members]
        check_abstention_rate(judgements, bound, f"stage {stage.name}, step {step}")
        self._journal.write(stage.name, step, groups)
        return groups

    def verifier(self, deadline_s: float) -> Grade:
        """Grades a trace by its final answer: 1 where it is right, else 0."""

        async def verify(problem: Problem, trace: Trace) -> Judgement:
            return await self._verifier.verify(problem.answer, trace.text, deadline_s)

        return verify

    def sample(
        self,
        purpose: tuple[str, int],
        problems: ProblemsConfig,
        indices: Sequence[int],
        group_size: int,
        sampling: SamplingConfig,
        version: str,
        grade: Grade,
    ) -> list[Group]:
        """`group_size` graded traces for each of the problems at `indices`, in that order.

        A trace is graded as soon as it is finished. `purpose` (stage and step) is shown and seeds the samples.
        """
        prompted = self._prompted[problems]
        by_id = {prompted.problems[i].id: prompted.problems[i] for i in indices}
        prompts = [Prompt(prompted.problems[i].id, prompted.prompts[i]) for i in indices]
        judgements: dict[Trace, Judgement] = {}
        with self._console.bar(" ".join(map(str, purpose)), len(prompts) * group_size) as bar:

            async def graded(trace: Trace) -> None:
                bar.advance("sampled")
                judgements[trace] = await grade(by_id[trace.problem_id], trace)
                bar.advance("graded")

            traces = self._conductor.run(
                sample_groups(
                    self._clients,
                    prompts,
                    group_size,
                    sampling,
                    lambda problem_id, k: sample_seed(self._config.seed, *purpose, problem_id, k),
                    weight_version=version,
                    on_trace=graded,
                )
            )
        return [
            Group(prompt.problem_id, tuple(GradedTrace(trace, judgements[trace]) for trace in members))
            for prompt, members in zip(prompts, traces, strict=True)
        ]


def _check_vocabulary(model: str, prompted: PromptedProblems) -> None:
    """A token that the model does not have would end the server."""
    vocabulary = read_architecture(model).vocabulary
    largest = max(max(ids) for ids in prompted.prompts)
    if largest >= vocabulary:
        raise UserError(
            f"The tokenizer in {model} gives token {largest}, but its model has {vocabulary} tokens; "
            "use the model's own."
        )


async def _ready(client: SGLangClient, deadline_s: float) -> None:
    """Return when the server answers; ServerError when it does not within `deadline_s`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + deadline_s
    while True:
        try:
            return await client.health()
        except ServerError:
            if loop.time() > deadline:
                raise
        await asyncio.sleep(_HEALTH_POLL_S)
