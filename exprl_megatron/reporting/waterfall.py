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

from exprl_megatron.reporting.timeline import GRADING, ROLLOUTS, SAMPLING, STEP, Span

PHASES = ("sync", "sampling", "grading", "log_probs", "train", "save", "other")
"""`other` is what no span covers: statistics, packing, the journal."""
_COLOURS = dict(zip(PHASES, ("#577590", "#2a9d8f", "#e9c46a", "#8ab17d", "#e76f51", "#b5838d", "#cccccc"), strict=True))

REMEDIES = {
    "sync": "another sync.transport or larger sync.bucket_mb (docs/resharding.md)",
    "sampling": "more sampling servers, or max_staleness, by which it runs beside learning (docs/asynchrony.md)",
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
        return sum(self.phases.values())


def step_times(spans: Sequence[Span]) -> list[StepTime]:
    """Of every finished step in the order of the timeline; of a step that was done again, the last time."""
    steps: dict[tuple[str, int], list[Span]] = defaultdict(list)
    for span in spans:
        steps[span.stage, span.step].append(span)
    return [
        StepTime(stage, step, _phases(of_step))
        for (stage, step), of_step in steps.items()
        if any(span.name == STEP for span in of_step)
    ]


def _phases(spans: Sequence[Span]) -> dict[str, float]:
    """The seconds of one step's phases."""
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
    """Seconds a step by phase."""
    return {name: sum(time.phases[name] for time in times) / len(times) for name in PHASES}


def stage_phases(spans: Sequence[Span]) -> dict[str, dict[str, float]]:
    """Seconds a step by phase, of every stage that has finished a step."""
    stages: dict[str, list[StepTime]] = defaultdict(list)
    for time in step_times(spans):
        stages[time.stage].append(time)
    return {stage: mean_phases(times) for stage, times in stages.items()}


def bottleneck(phases: Mapping[str, float]) -> str:
    """Return a sentence that names the longest phase of a step and what shortens it."""
    name = max(phases, key=phases.get)
    total = sum(phases.values())
    return f"{name} is the bottleneck, {phases[name] / total:.0%} of a step; what helps: {REMEDIES[name]}."


def waterfall_table(phases: Mapping[str, float], title: str) -> Table:
    """Seconds and share of every phase."""
    total = sum(phases.values())
    table = Table("phase", "s a step", "share", title=title)
    for name, seconds in phases.items():
        table.add_row(name, f"{seconds:.3f}", f"{seconds / total:6.1%}")
    table.add_row("step", f"{total:.3f}", "")
    return table


def draw_timeline(spans: Sequence[Span], title: str, path: Path) -> None:
    """Write the picture: a lane for the trainer, one for sampling, one for grading, over seconds."""
    lanes = {"grading": 0, "sampling": 1}
    first = min(span.start for span in spans)
    # Seldom wanted, and slow to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    seen = set()
    for span in spans:
        if span.name in (STEP, ROLLOUTS):
            continue
        lane, alone = lanes.get(span.name, 2), span.name not in lanes
        label = span.name if span.name not in seen else None
        seen.add(span.name)
        axes.broken_barh(
            [(span.start - first, span.end - span.start)],
            (lane - 0.35, 0.7),
            color=_COLOURS[span.name],
            alpha=1.0 if alone else 0.6,
            label=label,
        )
    axes.set(xlabel="s", yticks=range(3), title=title)
    axes.set_yticklabels(["grading", "sampling", "trainer"])
    axes.legend(frameon=False, ncols=len(seen), fontsize=7, loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
