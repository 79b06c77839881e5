"""Draws a judge's calibration: the scores of right and wrong traces in each arm, and the misplaced ones."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from exprl_megatron.judging.arms import ArmMetrics
from exprl_megatron.reporting.picture_file import save_picture

ARM_NAMES = {"right": "right reference", "none": "no reference", "wrong": "wrong reference"}
_RIGHT, _WRONG, _BAR = "#2a9d8f", "#e76f51", "#577590"


def draw_arms(arms: Sequence[ArmMetrics], title: str, path: Path) -> None:
    """Draw the metrics of `arms` to the file `path`, in the format of its suffix."""
    figure = Figure(figsize=(3.4 * (len(arms) + 1), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    *histograms, bars = figure.subplots(1, len(arms) + 1)
    for axes, arm in zip(histograms, arms, strict=True):
        _draw_scores(axes, arm)
    histograms[0].set_ylabel("share of traces")
    histograms[0].legend(frameon=False)
    _draw_misplacement(bars, arms)
    figure.suptitle(title)
    save_picture(figure, path)


def _draw_scores(axes: Axes, arm: ArmMetrics) -> None:
    for side, counts, color in (("right", arm.right_scores, _RIGHT), ("wrong", arm.wrong_scores, _WRONG)):
        total = max(1, sum(counts))
        places = [score + (-0.2 if side == "right" else 0.2) for score in range(1, 6)]
        axes.bar(places, [count / total for count in counts], 0.4, color=color, label=f"{side} traces")
    axes.axvline(3.5, color="grey", linestyle=":")
    axes.set(title=ARM_NAMES[arm.arm], xlabel="score", ylim=(0, 1), xticks=range(1, 6))


def _draw_misplacement(axes: Axes, arms: Sequence[ArmMetrics]) -> None:
    for place, arm in enumerate(arms):
        rate = arm.misplaced.rate
        axes.bar(place, rate, 0.6, color=_BAR)
        if arm.interval is not None:
            axes.vlines(place, arm.interval.low, arm.interval.high, color="black")
    axes.axhline(0.5, color="grey", linestyle=":")
    axes.set(title="misplacement, 95 %", ylim=(0, 1), xticks=range(len(arms)))
    axes.set_xticklabels([ARM_NAMES[arm.arm].replace(" ", "\n") for arm in arms])
