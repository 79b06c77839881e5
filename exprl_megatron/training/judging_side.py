"""All of a run that may read references: the judge, its store and its gate, and the verifier of answers."""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stages import JudgedStage, RlStage, SelfDistillStage
from exprl_megatron.config.verifying import VerifierConfig
from exprl_megatron.judging.abstentions import AbstentionWindow
from exprl_megatron.judging.gate import JudgeGate
from exprl_megatron.judging.judge import Judge
from exprl_megatron.judging.judged_traces import read_judged_traces
from exprl_megatron.judging.store import JudgementStore
from exprl_megatron.rewards.containment import Limits
from exprl_megatron.rewards.verifier import AnswerVerifier
from exprl_megatron.rollout.group import Group
from exprl_megatron.training.console import Console
from exprl_megatron.training.grading import Grade, grade_of, verified


class JudgingSide:
    """Lives on rank 0, between its construction and `close`; `judges` are the clients of the judge's servers."""

    def __init__(self, config: RunConfig, store: Path, judges: Sequence[Any], console: Console):
        self._config = config
        self._console = console
        self._open = ExitStack()
        self._verifier = self._open.enter_context(_verifier(config.verifier)) if config.samples else None
        self._judge: Judge | None = None
        self._asked_anew: Judge | None = None
        self._gate: JudgeGate | None = None
        self._windows: dict[str, AbstentionWindow] = {}
        self._counted: Counter[str] = Counter()
        if config.judges:
            judge = config.judge
            kept = self._open.enter_context(JudgementStore(Path(judge.store) if judge.store else store))
            tokenizer = AutoTokenizer.from_pretrained(judge.model)
            self._judge = Judge(judge, judges, tokenizer, store=kept)
            if judge.gate is not None:
                self._gate = JudgeGate(judge.gate, read_judged_traces(judge.gate.traces, judge.gate.limit))
                # A store would answer the repeated check for the judge.
                self._asked_anew = Judge(judge, judges, tokenizer)

    def grade(self, stage: RlStage, policy_tokenizer: Any) -> Grade:
        """How the traces of `stage` are graded."""
        return grade_of(stage, self._judge, self.grade_by_answer(), policy_tokenizer)

    def grade_by_answer(self) -> Grade:
        """How traces are graded that are evaluated."""
        return verified(self._verifier, self._config.verifier)

    async def check_judge(self, stage: RlStage, step: int) -> None:
        """Put the judge through its gate where it is due before this step; RunStopped where it fails."""
        if self._gate is None or not isinstance(stage, JudgedStage):
            return
        every = self._config.judge.gate.every_steps
        first = next(s.name for s in self._config.stages if isinstance(s, JudgedStage))
        if (stage.name, step) == (first, 1) or (every is not None and (step - 1) % every == 0):
            result = await self._gate.check(self._asked_anew.grade)
            figures = ", ".join(f"{name} {value:.3f}" for name, value in result.metrics().items())
            self._console.say(f"the judge before step {step} of {stage.name}: {figures}")
            self._gate.require(result, f"stage {stage.name}, before step {step}")

    def check_abstentions(self, stage: RlStage, step: int, groups: Sequence[Group]) -> None:
        """Raise RunStopped where too many of the latest judgements are abstentions."""
        if isinstance(stage, SelfDistillStage):
            return  # learns without grades
        judged = isinstance(stage, JudgedStage)
        rate = self._config.judge.max_abstention_rate if judged else stage.max_abstention_rate
        judgements = [unit for group in groups for member in group.members for unit in member.units]
        size = self._config.judge.abstention_window if judged else len(judgements)
        window = self._windows.setdefault(stage.name, AbstentionWindow(rate, size))
        window.add(judgements, f"stage {stage.name}, step {step}")

    def take_counts(self) -> dict[str, int]:
        """What the judge's work has taken since this was asked last; see SampledStep.judge_counts.

        Where several steps are judged at once, each counts what was asked until it was finished, once among them all.
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


def _verifier(config: VerifierConfig) -> AnswerVerifier:
    return AnswerVerifier(config.workers, config.variant, Limits(wall_s=config.test_deadline_s))
