"""Tables of a judge's calibration for the terminal."""

import math
from collections.abc import Callable, Sequence

from rich.table import Table

from exprl_megatron.evaluation.judge_picture import ARM_NAMES
from exprl_megatron.judging.arms import ArmMetrics
from exprl_megatron.judging.wrong_steps import WrongStepMetrics
from exprl_megatron.utils.intervals import Interval

_ARM_ROWS: dict[str, Callable[[ArmMetrics], str]] = {
    "misplacement": lambda arm: _percent(arm.misplaced.rate),
    "95 %, over problems": lambda arm: _bounds(arm.interval, 100),
    "FPR, wrong passed": lambda arm: _percent(arm.misplaced.false_positive),
    "FNR, right failed": lambda arm: _percent(arm.misplaced.false_negative),
    "AUROC": lambda arm: _number(arm.auroc),
    "abstained": lambda arm: _abstained(arm),
    "scores 1-5 of right": lambda arm: " ".join(map(str, arm.right_scores)),
    "scores 1-5 of wrong": lambda arm: " ".join(map(str, arm.wrong_scores)),
    "length bias, right": lambda arm: _number(arm.right_length_bias),
    "length bias, wrong": lambda arm: _number(arm.wrong_length_bias),
    "repeated, same score": lambda arm: "-" if arm.consistency is None else _percent(arm.consistency.agreement),
    "repeated, std. dev.": lambda arm: "-" if arm.consistency is None else _number(arm.consistency.deviation),
}

_STEP_ROWS: dict[str, Callable[[WrongStepMetrics], str]] = {
    "score before the marked step": lambda granularity: _number(granularity.mean_before),
    "score with the marked step": lambda granularity: _number(granularity.mean_after),
    "score where nothing is marked": lambda granularity: _number(granularity.mean_unmarked),
    "AUROC": lambda granularity: _number(granularity.auroc),
    "95 %, over problems": lambda granularity: _bounds(granularity.interval),
    "AUROC within a trace": lambda granularity: _number(granularity.paired_auroc),
    "pairs that fall / equal / rise": lambda granularity: (
        f"{granularity.falls} / {granularity.equals} / {granularity.rises}"
    ),
    "abstained": lambda granularity: f"{granularity.abstained} of {granularity.judgements}",
}


def arms_table(arms: Sequence[ArmMetrics], title: str) -> Table:
    """Build a table with a column for each arm."""
    caption = "misplacement: (FPR + FNR) / 2; length bias: rank correlation of score and length"
    return _table(title, caption, [ARM_NAMES[arm.arm] for arm in arms], _ARM_ROWS, arms)


def wrong_steps_table(units: Sequence[WrongStepMetrics], title: str) -> Table:
    """Build a table with a column for each granularity."""
    caption = "AUROC: probability that a right text scores higher than one with the first wrong step"
    return _table(title, caption, [granularity.granularity for granularity in units], _STEP_ROWS, units)


def _table(title: str, caption: str, names: Sequence[str], rows: dict[str, Callable], columns: Sequence) -> Table:
    table = Table(title=title, caption=caption)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for name, cell in rows.items():
        table.add_row(name, *map(cell, columns))
    return table


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _bounds(interval: Interval | None, scale: float = 1.0) -> str:
    if interval is None:
        return "-"
    digits = 1 if scale == 100 else 3
    return f"{scale * interval.low:.{digits}f} to {scale * interval.high:.{digits}f}"


def _abstained(arm: ArmMetrics) -> str:
    reasons = [f"{reason} {count}" for reason, count in arm.abstained.items()]
    return "\n".join([f"{sum(arm.abstained.values())} of {arm.traces}", *reasons])
