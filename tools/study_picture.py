"""Draws pass@1 of a study's arms after both stages with its intervals, from the tables of docs/study.md.

python tools/study_picture.py [docs/study.md] [--out docs/study/pass.svg]
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"stage 1 pass@1": "#577590", "stage 2 pass@1": "#e76f51"}
"""A table's column, and its color."""
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
    """The cells of both stages, each arm once, in the order of the tables."""
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
    out.parent.mkdir(parents=True, exist_ok=True)
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
