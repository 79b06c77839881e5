"""The gate: a judge that does not tell right traces from wrong ones, by the reference or by itself, may not train."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from exprl_megatron.config.judging import GateConfig
from exprl_megatron.errors import RunStopped
from exprl_megatron.judging.arms import ARMS, ArmFigures, GradeText, arm_figures, judge_arm
from exprl_megatron.judging.judged_traces import JudgedTrace


@dataclass(frozen=True)
class GateResult:
    """The three arms' figures."""

    right: ArmFigures
    none: ArmFigures
    wrong: ArmFigures

    @property
    def separation(self) -> float:
        """How much more is misplaced without the right reference: the smaller of the two differences."""
        return min(self.none.misplaced.rate, self.wrong.misplaced.rate) - self.right.misplaced.rate

    def metrics(self) -> dict[str, float]:
        """Figures for the log; nan where nothing was to be measured."""
        arms = {arm: getattr(self, arm) for arm in ARMS}
        rates = {f"misplacement_{arm}": figures.misplaced.rate for arm, figures in arms.items()}
        abstained = sum(self.right.abstained.values()) / self.right.traces
        return {**rates, "separation": self.separation, "auroc": self.right.auroc, "abstained": abstained}

    def record(self) -> dict[str, Any]:
        """The arms in JSON's terms."""
        return {arm: getattr(self, arm).record() for arm in ARMS}


class JudgeGate:
    """Judges a frozen set of traces with the right reference, none and a wrong one, and compares with the bounds."""

    def __init__(self, config: GateConfig, traces: Sequence[JudgedTrace]):
        self._config = config
        self._traces = tuple(traces)

    async def check(self, grade: GradeText) -> GateResult:
        """The figures of the judge behind `grade`.

        A repeated check is worth something only where `grade` asks the servers again, and not a store.
        """
        arms = {arm: arm_figures(arm, self._traces, await judge_arm(grade, self._traces, arm)) for arm in ARMS}
        return GateResult(**arms)

    def require(self, result: GateResult, where: str) -> None:
        """Raise RunStopped, in one sentence, where a bound is passed or could not be measured.

        `where` names the place in the message, for example "before stage priming".
        """
        faults = list(self._faults(result))
        if faults:
            raise RunStopped(
                f"{where}: the judge did not pass its gate on {len(self._traces)} traces of {self._config.traces}: "
                f"{' and '.join(faults)}; look at it with `exprl judge-bench`, then take a stronger judge or another "
                "prompt, or move the bound in judge.gate."
            )

    def remark(self, result: GateResult) -> str | None:
        """A sentence about a judge that needs no reference on these traces; None about another."""
        if not result.none.misplaced.rate <= self._config.max_misplacement:
            return None
        return (
            f"without a reference {_told(result.none)}, so that no separation is asked for; with a wrong reference "
            f"{_told(result.wrong)}"
        )

    def _faults(self, result: GateResult) -> Iterator[str]:
        bound = self._config.max_misplacement
        # Written so that nan, where too little was scored, is a fault too.
        if not result.right.misplaced.rate <= bound:
            yield f"with the right reference {_told(result.right)}, more than max_misplacement ({bound:.1%}) allows"
        # A judge that is right without a reference need not be worse without one.
        if self.remark(result) is not None:
            return
        for figures, reference in ((result.none, "no reference"), (result.wrong, "a wrong reference")):
            apart = figures.misplaced.rate - result.right.misplaced.rate
            if not apart >= self._config.min_separation:
                yield (
                    f"with {reference} {_told(figures)}, which is not min_separation "
                    f"({self._config.min_separation:.1%}) above the {_percent(result.right)} with the right one"
                )


def _told(figures: ArmFigures) -> str:
    interval = figures.interval
    bounds = "" if interval is None else f" [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    abstained = "".join(f", {reason} {count}" for reason, count in figures.abstained.items())
    return f"it misplaces {_percent(figures)}{bounds}" + (f" (abstained{abstained[1:]})" if abstained else "")


def _percent(figures: ArmFigures) -> str:
    rate = figures.misplaced.rate
    return "an unknown share" if rate != rate else f"{rate:.1%}"
