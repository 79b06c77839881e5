"""Draws the picture of a run that the README shows: rewards of every step, and pass@1 with its intervals.

python tools/draw_demo.py RUN --out docs/demo.svg
"""

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from exprl_megatron.reporting.metrics import read_metrics

SERIES = {
    "reward/mean": ("mean reward", "#2a9d8f", (-8, 6), "right"),
    "verifier/right": ("right by the verifier", "#577590", (8, -10), "left"),
}
"""Metric: its label, color, and where the label is beside the curve's third part."""


def values(records: list[dict], metric: str) -> tuple[list[int], list[float]]:
    """Return the steps that have the metric, counted over all stages, and its values in percent."""
    found = [(record["step"], 100 * record["metrics"][metric]) for record in records if metric in record["metrics"]]
    return [step for step, _ in found], [value for _, value in found]


def draw(records: list[dict], out: Path) -> None:
    """Write the picture of a run's records of metrics.jsonl."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for metric, (label, color, offset, side) in SERIES.items():
        steps, percent = values(records, metric)
        axes.plot(steps, percent, color=color, linewidth=1.6)
        at = len(steps) // 3
        axes.annotate(label, (steps[at], percent[at]), xytext=offset, textcoords="offset points", color=color, ha=side)
    _evaluations(axes, records)
    _stages(axes, records)
    axes.set(xlabel="step", ylabel="%", ylim=(-2, 104))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, metadata={"Date": None})


def _evaluations(axes: Axes, records: list[dict]) -> None:
    """Points for pass@1 on the held-out problems, with their intervals."""
    steps, mean = values(records, "evaluation/pass@1")
    low, high = (values(records, f"evaluation/pass@1/{bound}")[1] for bound in ("low", "high"))
    spread = [[m - b for m, b in zip(mean, low, strict=True)], [t - m for m, t in zip(mean, high, strict=True)]]
    axes.errorbar(steps, mean, yerr=spread, color="#e76f51", fmt="o", capsize=3, zorder=3)
    axes.annotate("pass@1, held out", (steps[1], mean[1]), xytext=(8, -14), textcoords="offset points", color="#e76f51")


def _stages(axes: Axes, records: list[dict]) -> None:
    """A line where each stage begins, with its name."""
    first: dict[str, int] = {}
    for record in records:
        first.setdefault(record["stage"], record["step"])
    for stage, step in first.items():
        axes.axvline(max(0, step - 0.5), color="#999999", linewidth=0.8, linestyle=":")
        axes.annotate(
            f"stage {stage}",
            (max(0, step - 0.5), 101),
            xytext=(4, 0),
            textcoords="offset points",
            color="#555555",
            fontsize=9,
        )


def main() -> None:
    """Read the run and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    draw(read_metrics(args.run / "metrics.jsonl"), args.out)


if __name__ == "__main__":
    main()
