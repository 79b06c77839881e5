"""The components of a run that may read references: the judge, its store and its gate, and the answer verifier."""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stages import ExprlOutcomeStage, JudgedStage, RlStage, SparseRlStage
from exprl_megatron.config.verifying import VerifierConfig
from exprl_megatron.judging.abstentions import AbstentionWindow
from exprl_megatron.judging.gate import JudgeGate
from exprl_megatron.judging.judge import Judge
from exprl_megatron.judging.judgement import Abstained, Judgement, Scored
from exprl_megatron.judging.labeled_traces import read_labeled_traces
from exprl_megatron.judging.store import JudgementStore
from exprl_megatron.models.tokenizer import load_tokenizer
from exprl_megatron.problems.problem import Problem
from exprl_megatron.rewards.containment import Limits
from exprl_megatron.rewards.verifier import AnswerVerifier
from exprl_megatron.rollout.custom_functions import custom_verifiers
from exprl_megatron.rollout.group import GradedTrace, Group
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.training.custom_rewards import custom_terms
from exprl_megatron.training.grading import GradeTrace, grade_of, verified, with_terms
from exprl_megatron.training.run_logger import RunLogger
from exprl_megatron.utils.required import required


class JudgingRuntime:
    """The judge and the verifier of a run, on rank 0; `judges` are the clients of the judge's servers."""

    def __init__(self, config: RunConfig, store: Path, judges: Sequence[Any], logger: RunLogger):
        self._config = config
        self._logger = logger
        self._open = ExitStack()
        self._verifier = self._open.enter_context(_verifier(config.verifier)) if config.needs_sampling_servers else None
        self._custom_verifiers = custom_verifiers(config.verifier, logger.log)
        self._custom_terms = {
            stage.name: custom_terms(stage.name, stage.reward, config.verifier.answer_deadline_s, logger.log)
            for stage in config.stages
            if isinstance(stage, ExprlOutcomeStage | SparseRlStage)
        }
        self._judge: Judge | None = None
        self._uncached_judge: Judge | None = None
        self._gate: JudgeGate | None = None
        self._windows: dict[str, AbstentionWindow] = {}
        self._counted: Counter[str] = Counter()
        self._gate_metrics: dict[tuple[str, int], dict[str, float]] = {}
        if config.needs_judge:
            judge = config.required_judge
            opened = self._open.enter_context(JudgementStore(Path(judge.store) if judge.store else store))
            tokenizer = None if judge.model is None else load_tokenizer(judge.model)
            self._judge = Judge(judge, judges, tokenizer, store=opened)
            if judge.gate is not None:
                self._gate = JudgeGate(
                    judge.gate, read_labeled_traces(judge.gate.traces, judge.gate.limit, config.domains)
                )
                # With a store, a repeated check would read the earlier judgements.
                self._uncached_judge = Judge(judge, judges, tokenizer)

    def grade(self, stage: RlStage, policy_tokenizer: Any) -> GradeTrace:
        """Return the function that grades the traces of `stage`."""
        grade = grade_of(stage, self._judge, self.grade_by_answer(), policy_tokenizer)
        if isinstance(stage, ExprlOutcomeStage | SparseRlStage) and stage.reward:
            return with_terms(stage, grade, self._custom_terms[stage.name])
        return grade

    def grade_by_answer(self) -> GradeTrace:
        """Return the function that grades traces by their final answer, as evaluations do."""
        return verified(self._verifier, self._config.verifier, self._custom_verifiers)

    async def judgement_of(self, problem: Problem, trace: Trace, by: str) -> Judgement:
        """Judge a whole trace by the `judge` or the `verifier`.

        Raises:
            ValueError: `by` is judge, and the run has none.
            ServerError: see Judge.grade.
        """
        if by != "judge":
            return (await self.grade_by_answer()(problem, trace)).judgement
        if self._judge is None:
            raise ValueError("the stage has no judge; set its base to exprl-outcome or exprl-process")
        return await self._judge.grade(problem, trace.text)

    async def check_judge(self, stage: RlStage, step: int) -> None:
        """Check the judge against its gate, where a check is due before this step.

        Raises:
            RunStopped: the judge does not pass.
        """
        if self._gate is None or not isinstance(stage, JudgedStage):
            return
        gate = self._config.required_judge.gate
        every = None if gate is None else gate.every_steps
        first = next(s.name for s in self._config.stages if isinstance(s, JudgedStage))
        if (stage.name, step) == (first, 1) or (every is not None and (step - 1) % every == 0):
            result = await self._gate.evaluate(required(self._uncached_judge, "the judge without a store").grade)
            metrics = result.metrics()
            self._gate_metrics[stage.name, step] = {f"gate/{name}": value for name, value in metrics.items()}
            figures = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            self._logger.log(f"the judge before step {step} of {stage.name}: {figures}")
            self._gate.require_pass(result, f"stage {stage.name}, before step {step}")

    def take_gate_metrics(self, stage: str, step: int) -> dict[str, float]:
        """Return the metrics of the gate before this step; {} where it was not checked."""
        return self._gate_metrics.pop((stage, step), {})

    def check_abstentions(self, stage: RlStage, step: int, groups: Sequence[Group]) -> None:
        """Check the share of abstentions among the latest judgements.

        Raises:
            RunStopped: it is larger than the config allows.
        """
        judgements = [judgement for group in groups for sample in group.samples for judgement in _outcomes(sample)]
        if isinstance(stage, JudgedStage):
            judge = self._config.required_judge
            rate, size = judge.max_abstention_rate, judge.abstention_window
        elif isinstance(stage, SparseRlStage):
            rate, size = stage.max_abstention_rate, len(judgements)
        else:
            return  # self-distillation learns without grades
        window = self._windows.setdefault(stage.name, AbstentionWindow(rate, size))
        window.add(judgements, f"stage {stage.name}, step {step}")

    def take_counts(self) -> dict[str, int]:
        """Return the numbers of the judge's requests since the last call; see SampledStep.judge_counts.

        Where several steps are judged concurrently, each request is counted once, in the step that is finished next.
        """
        if self._judge is None:
            return {}
        counts = self._judge.counts | Counter(rubric_fallbacks=self._judge.rubric_fallbacks.total())
        new = counts - self._counted
        self._counted = counts
        return {name: new[name] for name in sorted(counts)}

    def close(self) -> None:
        """End the verifier's processes and close the store."""
        self._open.close()


def _outcomes(sample: GradedTrace) -> list[Judgement]:
    """Return the judgements of a trace; of a reward with several terms, whether all terms have a value."""
    if not sample.terms:
        return sample.judgements
    missing = [f"{term.name}: {term.evidence}" for term in sample.terms if term.value is None]
    return [Abstained("reward-term", missing[0])] if missing else [Scored(1.0)]


def _verifier(config: VerifierConfig) -> AnswerVerifier:
    return AnswerVerifier(config.workers, config.variant, Limits(wall_s=config.test_deadline_s))
