"""The table that ends a run: pass@k of the base model and of what each stage left."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from rich.table import Table

from exprl_megatron.evaluation.pass_at_k import PassAtK

Evaluations = Mapping[str, Sequence[PassAtK]]
"""Name of a model -> its estimates, one for each k; in the order to be shown."""


def evaluation_table(evaluations: Evaluations, title: str, confidence: float) -> Table:
    """A row for each model and a column for each k: percent, with the interval and the gain over the first row."""
    ks = sorted({estimate.k for estimates in evaluations.values() for estimate in estimates})
    gains = "; +/-: against the first" if len(evaluations) > 1 else ""
    table = Table(title=title, caption=f"in brackets: {confidence:.0%} interval over problems{gains}")
    table.add_column("model")
    for k in ks:
        table.add_column(f"pass@{k}", justify="right")
    first: dict[int, PassAtK] = {}
    for name, estimates in evaluations.items():
        of_k = {estimate.k: estimate for estimate in estimates}
        table.add_row(name, *(_cell(of_k.get(k), first.get(k)) for k in ks))
        first = first or of_k
    return table


def evaluation_record(evaluations: Evaluations) -> dict[str, list[dict]]:
    """The same in JSON's terms: name -> [{k, mean, low, high, problems}]."""
    return {name: [asdict(estimate) for estimate in estimates] for name, estimates in evaluations.items()}


def _cell(estimate: PassAtK | None, first: PassAtK | None) -> str:
    if estimate is None:
        return "-"
    text = f"{100 * estimate.mean:.1f} % [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
    return text if first is None else f"{text} {100 * (estimate.mean - first.mean):+.1f}"
