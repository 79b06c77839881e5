"""Breakdown of a step's time as the trainer sees it: every second in one phase, and the bottleneck among them.

Sampling and grading overlap with each other, and where steps are sampled ahead with learning too. Only the time that
the trainer waits for a step's rollouts is theirs: to sampling as long as a trace of the step is being written, to
grading after that.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from exprl_megatron.reporting.picture_file import save_picture
from exprl_megatron.reporting.timeline import GRADING, ROLLOUTS, SAMPLING, STEP, Span

PHASES = ("sync", "sampling", "grading", "log_probs", "train", "save", "other")
"""`other` is what no span covers: statistics, packing, the rollout log."""
_COLORS = dict(zip(PHASES, ("#577590", "#2a9d8f", "#e9c46a", "#8ab17d", "#e76f51", "#b5838d", "#cccccc"), strict=True))

REMEDIES = {
    "sync": "another sync.transport or larger sync.bucket_mb (docs/resharding.md)",
    "sampling": "more sampling servers, or max_staleness, with which it overlaps with learning (docs/asynchrony.md)",
    "grading": "more judge servers, more of judge.concurrency, or more verifier.workers",
    "log_probs": "more trainer ranks, or policy.ref_policy: server",
    "train": "more trainer ranks, or another layout (`exprl plan`)",
    "save": "a larger checkpoint.every_steps",
    "other": "a profiler: no part of the trainer says what it is",
}


@dataclass(frozen=True)
class StepTime:
    """A step's seconds by phase; they add up to `seconds`."""

    stage: str
    step: int
    phases: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return sum(self.phases.values())


def step_times(spans: Sequence[Span]) -> list[StepTime]:
    """Return the times of every finished step in timeline order; of a repeated step, the last ones."""
    steps: dict[tuple[str, int], list[Span]] = defaultdict(list)
    for span in spans:
        steps[span.stage, span.step].append(span)
    return [
        StepTime(stage, step, _phases(of_step))
        for (stage, step), of_step in steps.items()
        if any(span.name == STEP for span in of_step)
    ]


def _phases(spans: Sequence[Span]) -> dict[str, float]:
    """Return the seconds of one step's phases."""
    last = {span.name: span for span in spans if span.name not in (SAMPLING, GRADING)}
    step = last.pop(STEP)
    found = dict.fromkeys(PHASES, 0.0)
    for name, span in last.items():
        if name in found and span.end >= step.start:
            found[name] = span.end - span.start
    if ROLLOUTS in last:
        wait = last[ROLLOUTS]
        written = max((s.end for s in spans if s.name == SAMPLING), default=wait.start)
        graded = max((s.end for s in spans if s.name == GRADING), default=wait.start)
        found["sampling"] = max(0.0, min(written, wait.end) - wait.start)
        found["grading"] = max(0.0, min(graded, wait.end) - max(written, wait.start))
    # The checkpoint is written behind the step.
    found["other"] = max(0.0, step.end - step.start - sum(found.values()) + found["save"])
    return found


def mean_phases(times: Sequence[StepTime]) -> dict[str, float]:
    """Return the seconds a step by phase."""
    return {name: sum(time.phases[name] for time in times) / len(times) for name in PHASES}


def stage_phases(spans: Sequence[Span]) -> dict[str, dict[str, float]]:
    """Return the seconds a step by phase, of every stage that has finished a step."""
    stages: dict[str, list[StepTime]] = defaultdict(list)
    for time in step_times(spans):
        stages[time.stage].append(time)
    return {stage: mean_phases(times) for stage, times in stages.items()}


def bottleneck(phases: Mapping[str, float]) -> str:
    """Return a sentence that names the longest phase of a step and what shortens it."""
    name = max(phases, key=lambda phase: phases[phase])
    total = sum(phases.values())
    return f"{name} is the bottleneck, {phases[name] / total:.0%} of a step; what helps: {REMEDIES[name]}."


def waterfall_table(phases: Mapping[str, float], title: str) -> Table:
    """Return the seconds and share of every phase."""
    total = sum(phases.values())
    table = Table("phase", "s a step", "share", title=title)
    for name, seconds in phases.items():
        table.add_row(name, f"{seconds:.3f}", f"{seconds / total:6.1%}")
    table.add_row("step", f"{total:.3f}", "")
    return table


def draw_timeline(spans: Sequence[Span], title: str, path: Path) -> None:
    """Write the picture: lanes for trainer, sampling and grading over seconds, steps numbered at their beginnings.

    Dark grading is what the trainer waited for, as in the table; pale grading overlapped with sampling.
    """
    first = min(span.start for span in spans)
    # This import is slow, and few commands need it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for bar in bars(spans):
        shifted = [(start - first, end - start) for start, end in bar.ranges]
        axes.broken_barh(
            shifted,
            (bar.lane - 0.35, 0.7),
            color=_COLORS[bar.name],
            alpha=1.0 if bar.waited_for else 0.35,
            linewidth=0,
            label=bar.label,
        )
    for span in spans:
        if span.name == STEP:
            axes.axvline(span.start - first, color="#888888", linewidth=0.6, linestyle=":")
            axes.annotate(str(span.step), (span.start - first, 2.42), fontsize=7, color="#555555")
    axes.set(xlabel="s", yticks=range(3), ylim=(-0.5, 2.7), title=title)
    axes.set_yticklabels(["grading", "sampling", "trainer"])
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    order = sorted(named, key=lambda label: PHASES.index(label.split(",")[0]))
    figure.legend([named[label] for label in order], order, frameon=False, fontsize=8, loc="outside right center")
    save_picture(figure, path)


@dataclass(frozen=True)
class TimelineBar:
    """The spans that are drawn in one color: starts and ends in the timeline's seconds."""

    name: str
    lane: int
    """0 grading, 1 sampling, 2 the trainer's phases."""
    ranges: list[tuple[float, float]]
    waited_for: bool = True
    """False for grading as a whole; what of it the trainer waited for is a bar of its own."""

    @property
    def label(self) -> str:
        """The legend's words."""
        if self.name != GRADING:
            return self.name
        return "grading, waited for" if self.waited_for else "grading, beside sampling"


def bars(spans: Sequence[Span]) -> list[TimelineBar]:
    """Return the picture's bars; a later one is drawn over an earlier one, so short ones come last."""
    of_name: dict[str, list[tuple[float, float]]] = defaultdict(list)
    written: dict[tuple[str, int], float] = {}
    for span in spans:
        if span.name not in (STEP, ROLLOUTS):
            of_name[span.name].append((span.start, span.end))
        if span.name == SAMPLING:
            written[span.stage, span.step] = max(span.end, written.get((span.stage, span.step), span.end))
    waited = [
        (max(span.start, written.get((span.stage, span.step), span.start)), span.end)
        for span in spans
        if span.name == GRADING
    ]
    lanes = {GRADING: 0, SAMPLING: 1}
    drawn = [TimelineBar(name, lanes.get(name, 2), ranges, name != GRADING) for name, ranges in of_name.items()]
    drawn.append(TimelineBar(GRADING, 0, [(start, end) for start, end in waited if end > start]))
    return sorted(drawn, key=lambda bar: -max((end - start for start, end in bar.ranges), default=0.0))
