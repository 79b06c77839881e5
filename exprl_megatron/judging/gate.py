"""The calibration gate: a judge that does not separate right traces from wrong ones must not train a policy."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from exprl_megatron.config.judging import GateConfig
from exprl_megatron.errors import RunStopped
from exprl_megatron.judging.arms import ARMS, ArmMetrics, GradeText, arm_metrics, judge_arm
from exprl_megatron.judging.labeled_traces import LabeledTrace


@dataclass(frozen=True)
class GateResult:
    """The metrics of the three arms."""

    right: ArmMetrics
    none: ArmMetrics
    wrong: ArmMetrics

    @property
    def separation(self) -> float:
        """Return how much larger the misplacement is without the right reference: the smaller of the two
        differences.
        """
        return min(self.none.misplaced.rate, self.wrong.misplaced.rate) - self.right.misplaced.rate

    def metrics(self) -> dict[str, float]:
        """Return the metrics for the log; nan where there is nothing to measure."""
        arms = {arm: getattr(self, arm) for arm in ARMS}
        rates = {f"misplacement_{arm}": figures.misplaced.rate for arm, figures in arms.items()}
        abstained = sum(self.right.abstained.values()) / self.right.traces
        return {**rates, "separation": self.separation, "auroc": self.right.auroc, "abstained": abstained}

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics of each arm as JSON types."""
        return {arm: getattr(self, arm).to_dict() for arm in ARMS}


class JudgeGate:
    """Judges a fixed set of traces with the right, no and a wrong reference, and compares the metrics with bounds."""

    def __init__(self, config: GateConfig, traces: Sequence[LabeledTrace]):
        self._config = config
        self._traces = tuple(traces)

    async def evaluate(self, grade: GradeText) -> GateResult:
        """Measure the judge behind `grade`.

        A repeated evaluation is useful only where `grade` does not read a judgement store.
        """
        arms = {arm: arm_metrics(arm, self._traces, await judge_arm(grade, self._traces, arm)) for arm in ARMS}
        return GateResult(**arms)

    def require_pass(self, result: GateResult, where: str) -> None:
        """Compare a result with the bounds; `where` is the place in the message, for example "before stage priming".

        Raises:
            RunStopped: a bound is exceeded, or could not be measured.
        """
        faults = list(self._faults(result))
        if faults:
            raise RunStopped(
                f"{where}: the judge did not pass its gate on {len(self._traces)} traces of {self._config.traces}: "
                f"{' and '.join(faults)}; inspect it with `exprl judge-bench`, then use a stronger judge or another "
                "prompt, or change the bound in judge.gate."
            )

    def no_reference_note(self, result: GateResult) -> str | None:
        """Return a sentence about a judge that needs no reference on these traces; None where it needs one."""
        if not result.none.misplaced.rate <= self._config.max_misplacement:
            return None
        return (
            f"without a reference {_described(result.none)}, so that no separation is required; with a wrong reference "
            f"{_described(result.wrong)}"
        )

    def _faults(self, result: GateResult) -> Iterator[str]:
        bound = self._config.max_misplacement
        # The comparison is false for nan, so that too few scores are a fault too.
        if not result.right.misplaced.rate <= bound:
            described = _described(result.right)
            yield f"with the right reference {described}, more than max_misplacement ({bound:.1%}) allows"
        # A judge that is right without a reference need not be worse without one.
        if self.no_reference_note(result) is not None:
            return
        for figures, reference in ((result.none, "no reference"), (result.wrong, "a wrong reference")):
            apart = figures.misplaced.rate - result.right.misplaced.rate
            if not apart >= self._config.min_separation:
                yield (
                    f"with {reference} {_described(figures)}, which is not min_separation "
                    f"({self._config.min_separation:.1%}) above the {_percent(result.right)} with the right one"
                )


def _described(figures: ArmMetrics) -> str:
    interval = figures.interval
    bounds = "" if interval is None else f" [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    abstained = "".join(f", {reason} {count}" for reason, count in figures.abstained.items())
    return f"it misplaces {_percent(figures)}{bounds}" + (f" (abstained{abstained[1:]})" if abstained else "")


def _percent(figures: ArmMetrics) -> str:
    rate = figures.misplaced.rate
    return "an unknown share" if rate != rate else f"{rate:.1%}"
