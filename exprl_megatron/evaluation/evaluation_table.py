"""The table at the end of a run: pass@k of the base model and of each stage's model."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from exprl_megatron.evaluation.pass_at_k import GradedCounts, PassAtK, estimate_gain, estimate_pass_at_k
from exprl_megatron.utils.intervals import DIFFERENCE_METHOD, METHOD

Evaluations = Mapping[str, GradedCounts]
"""Counts by the name of the model, in the order of the table."""


def evaluation_table(evaluations: Evaluations, ks: Sequence[int], title: str, confidence: float) -> Table:
    """Build a table with a row for each model and a column for each k: percent, and the gain over the first row.

    The caption gives the methods of the intervals, and the numbers of seeds and problems.
    """
    reached = max((graded for counts in evaluations.values() for graded, _ in counts.values()), default=0)
    ks = sorted(k for k in set(ks) if k <= reached)
    problems = " or ".join(map(str, sorted({len(counts) for counts in evaluations.values()})))
    caption = f"in brackets: {confidence:.0%} {METHOD} interval over {problems} problems, 1 seed"
    if len(evaluations) > 1:
        caption += (
            f"; +/-: gain over the first, paired by problem, with its {confidence:.0%} {DIFFERENCE_METHOD} interval"
        )
    table = Table(title=title, caption=caption)
    table.add_column("model")
    for k in ks:
        table.add_column(f"pass@{k}", justify="right")
    first: GradedCounts | None = None
    for name, counts in evaluations.items():
        table.add_row(name, *(_cell(counts, first, k, confidence) for k in ks))
        first = counts if first is None else first
    return table


def _cell(counts: GradedCounts, first: GradedCounts | None, k: int, confidence: float) -> str:
    if all(graded < k for graded, _ in counts.values()):
        return "-"
    estimate = estimate_pass_at_k(list(counts.values()), k, confidence)
    text = f"{100 * estimate.mean:.1f} % {_bounds(estimate)}"
    gain = None if first is None else estimate_gain(first, counts, k, confidence)
    return text if gain is None else f"{text}\n{100 * gain.mean:+.1f} {_bounds(gain)}"


def _bounds(estimate: PassAtK) -> str:
    return f"[{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
