"""The problems of a run: their prompts, their leak guards, and the order in which a stage draws them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from exprl_megatron.config.problems import ProblemsConfig
from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stages import RlStage
from exprl_megatron.errors import UserError
from exprl_megatron.judging.leaks import LeakGuard
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.problems.needs import count_shared
from exprl_megatron.problems.order import problem_indices
from exprl_megatron.problems.problem import Problem
from exprl_megatron.problems.prompts import PromptBuilder, PromptedProblems, check_vocabulary, drop_overlong
from exprl_megatron.problems.sources import load_problems
from exprl_megatron.rollout.custom_stage import PromptProblem
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.training.custom_stages import StageHooks, read_kept, write_kept
from exprl_megatron.training.run_logger import RunLogger


class RunProblems:
    """The problem sets of a run on rank 0, after `prepare`; `tokenizer` is the policy's."""

    def __init__(self, config: RunConfig, tokenizer: Any, logger: RunLogger):
        self._config = config
        self._tokenizer = tokenizer
        self._logger = logger
        self._kept = RunDirectory(config.directory).kept_problems
        self._choices: dict[str, Sequence[int]] = {}
        self.prompted: dict[ProblemsConfig, PromptedProblems] = {}
        """The problems of each set whose prompts fit into the context, with these prompts."""
        self.guards: dict[ProblemsConfig, LeakGuard] = {}

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
            self.prompted[problems] = prompted
            self.guards[problems] = LeakGuard(self._config.leak_guard, prompted.problems)
            if prompted.dropped:
                self._logger.log(f"{problems.source}: {prompted.dropped} prompts of more than {limit} tokens left out")
        self._log_shared()

    def _log_shared(self) -> None:
        """Log how many held-out problems the policy is also trained on."""
        if not self._config.has_evaluation:
            return
        held_out = self.prompted[self._config.required_evaluation.problems].problems
        trained = {stage.problems for stage in self._config.stages if isinstance(stage, RlStage)}
        for source, shared in sorted((p.source, count_shared(held_out, self.prompted[p].problems)) for p in trained):
            if shared:
                self._logger.log(
                    f"{shared} of {len(held_out)} problems of the evaluation are also in {source}, which is for "
                    "training: pass@k includes what the policy has seen"
                )

    def count(self, problems: ProblemsConfig) -> int:
        """Number of problems of the set whose prompts fit into the context."""
        return len(self.prompted[problems])

    def texts(self, stage: RlStage) -> Callable[[str], str]:
        """Return a function from a problem's id to its text; the empty text where the stage has no such problem."""
        prompted = self.prompted[stage.problems]

        def text(problem_id: str) -> str:
            index = prompted.index_of.get(problem_id)
            return "" if index is None else prompted.problems[index].statement

        return text

    def write_kept(self, stage: RlStage, hooks: StageHooks) -> None:
        """Write the problems that the user's stage, of these `hooks`, selects for later stages, if it selects any."""
        kept = hooks.kept_problems([problem.id for problem in self.shown(stage)])
        if kept is not None:
            write_kept(self._kept, stage.name, kept)

    def shown(self, stage: RlStage) -> Sequence[PromptProblem]:
        """Return the parts that the policy may read of the problems that the stage may sample.

        Raises:
            UserError: the stage depends on an earlier one that selected no problem.
        """
        return self._parts(stage, self._choice(stage))

    def drawn(self, stage: RlStage, first: int, count: int) -> list[PromptProblem]:
        """Return the same parts of the `count` problems from position `first` of the stage's order."""
        return self._parts(stage, self.indices(stage, first, count))

    def indices(self, stage: RlStage, first: int, count: int) -> list[int]:
        """Return the indices, in the stage's problem set, of the same problems as `drawn`."""
        choice = self._choice(stage)
        return [choice[i] for i in problem_indices(self._config.seed, stage.name, first, count, len(choice))]

    def index_of(self, stage: RlStage) -> Mapping[str, int]:
        """Return the index of each problem of the stage's problem set by its id."""
        return self.prompted[stage.problems].index_of

    def problem(self, stage: RlStage, problem_id: str) -> Problem:
        """Return a problem of the stage's problem set, with its reference."""
        prompted = self.prompted[stage.problems]
        return prompted.problems[prompted.index_of[problem_id]]

    def custom_prompt(self, stage: RlStage, problem_id: str, text: str) -> tuple[int, ...]:
        """Return the token ids of a prompt with `text` of the user's code in place of the problem's statement.

        Raises:
            UserError: the text is too long, or would not reach the policy unchanged.
        """
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
            problems, every = self.prompted[stage.problems].problems, range(len(self.prompted[stage.problems]))
            kept = None if stage.problems_from is None else read_kept(self._kept, stage.problems_from)
            found = every if kept is None else [i for i in every if problems[i].id in kept]
            if not found:
                raise UserError(
                    f"Stage {stage.name} has none of the problems that stage {stage.problems_from} kept; give both the "
                    "same `problems`."
                )
            self._choices[stage.name] = found
        return self._choices[stage.name]

    def _parts(self, stage: RlStage, indices: Sequence[int]) -> list[PromptProblem]:
        problems = (self.prompted[stage.problems].problems[i] for i in indices)
        return [PromptProblem(problem.id, problem.statement, problem.domain) for problem in problems]
