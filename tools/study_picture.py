"""Draws a study: pass@1 of its arms after both stages, from the tables of docs/study.md, and the arms' curves.

python tools/study_picture.py [docs/study.md] [--out docs/study/pass.svg] draws the first; tools/study.py draws both.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ablation_tables import SUCCESSES, Arm
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"stage 1 pass@1": "#577590", "stage 2 pass@1": "#e76f51"}
"""A table's column, and its color."""
_PANELS_IN_A_ROW = 4
_CELL = re.compile(r"([\d.]+) \[([\d.]+), ([\d.]+)\]")


@dataclass(frozen=True)
class Measured:
    """pass@1 of an arm in percent, with the bounds of its 95 % interval."""

    arm: str
    stage: str
    mean: float
    low: float
    high: float


def read_tables(markdown: str) -> list[Measured]:
    """Return the cells of both stages, each arm once, in the order of the tables."""
    found: dict[tuple[str, str], Measured] = {}
    columns: list[str] = []
    for line in markdown.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells and cells[0] == "arm":
            columns = cells
        elif len(cells) != len(columns):
            columns = []
            continue
        for column, cell in zip(columns, cells, strict=True):
            number = _CELL.fullmatch(cell)
            if column in STAGES and number:
                found.setdefault((cells[0], column), Measured(cells[0], column, *map(float, number.groups())))
    return list(found.values())


def draw(measured: list[Measured], out: Path) -> None:
    """Write the picture: a row for each arm, a point with its interval for each stage."""
    arms = list(dict.fromkeys(value.arm for value in measured))
    figure = Figure(figsize=(8, 0.6 + 0.42 * len(arms)), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for column, color in STAGES.items():
        rows = [value for value in measured if value.stage == column]
        axes.errorbar(
            [value.mean for value in rows],
            [arms.index(value.arm) + (0.14 if column == "stage 2 pass@1" else -0.14) for value in rows],
            xerr=[[value.mean - value.low for value in rows], [value.high - value.mean for value in rows]],
            fmt="o",
            markersize=5,
            capsize=3,
            color=color,
            label=column.replace(" pass@1", ""),
        )
    axes.set(yticks=range(len(arms)), xlim=(-3, 103), xlabel="pass@1 on held-out problems, %")
    axes.set_yticklabels(arms)
    axes.invert_yaxis()
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(frameon=False, loc="outside right upper")
    _save(figure, out)


def draw_curves(arms: Sequence[Arm], stages: Sequence[str], out: Path) -> None:
    """Write a panel for each arm: groups with a success in percent at each step of its stages, one after the other.

    Each seed is a thin line and their mean a thick one; a dashed line marks the start of each later stage. The stages
    have the same width in all panels, also where an arm has no such stage or does not sample in it.
    """
    curves = {arm.name: [100 * arm.curve(stage, SUCCESSES) for stage in stages] for arm in arms}
    lengths = [max(of_arm[n].shape[-1] for of_arm in curves.values()) for n in range(len(stages))]
    rows = -(-len(arms) // _PANELS_IN_A_ROW)
    figure = Figure(figsize=(9, 0.5 + 1.9 * rows), layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots(rows, _PANELS_IN_A_ROW, sharex=True, sharey=True, squeeze=False).flat
    for (name, of_stages), panel in zip(curves.items(), panels, strict=False):
        panel.set(title=name, xlim=(0.5, sum(lengths) + 0.5), ylim=(-4, 104))
        before = 0
        for values, length, color in zip(of_stages, lengths, STAGES.values(), strict=True):
            steps = range(before + 1, before + values.shape[-1] + 1)
            for seed in values if values.size else ():
                panel.plot(steps, seed, color=color, linewidth=0.8, alpha=0.55)
            if values.size:
                panel.plot(steps, values.mean(axis=0), color=color, linewidth=2.2)
            if before:
                panel.axvline(before + 0.5, color="#999999", linewidth=0.8, linestyle="--")
            before += length
        panel.grid(color="#eeeeee", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    for unused in panels:
        unused.set_visible(False)
    figure.supxlabel("step", fontsize="medium")
    figure.supylabel("groups with a success, %", fontsize="medium")
    handles = [Line2D([], [], color=color, linewidth=2.2) for color in STAGES.values()]
    labels = [column.replace(" pass@1", "") for column in STAGES]
    figure.legend(handles, labels, frameon=False, loc="outside upper right", ncols=len(labels))
    _save(figure, out)


def _save(figure: Figure, out: Path) -> None:
    """The same figures give the same file: neither the date nor random ids are in it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": out.stem}):
        figure.savefig(out, metadata={"Date": None})


def main() -> None:
    """Read the page and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, nargs="?", default=ROOT / "docs" / "study.md")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "study" / "pass.svg")
    args = parser.parse_args()
    draw(read_tables(args.page.read_text(encoding="utf-8")), args.out)


if __name__ == "__main__":
    main()
