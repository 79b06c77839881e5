"""The outputs of a run: lines and progress bars, metrics on disk and in trackers, the closing table."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console as Terminal

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stages import Stage
from exprl_megatron.evaluation.evaluation_table import Evaluations, evaluation_table
from exprl_megatron.reporting.metrics import MetricsWriter
from exprl_megatron.reporting.progress_bars import Bar, StepProgress
from exprl_megatron.reporting.run_log import command_started
from exprl_megatron.reporting.timeline import GRADING, SAMPLING, Span, Timeline, read_timeline
from exprl_megatron.reporting.trackers import TrackedRun, Trackers
from exprl_megatron.reporting.waterfall import bottleneck, stage_phases
from exprl_megatron.rollout.group import Group
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.runs.progress import RunProgress
from exprl_megatron.training.first_update import AssertionCounts
from exprl_megatron.training.sample_table import sample_table


class RunLogger:
    """Writes the outputs of a run, on rank 0; `progress` is the progress with which the run continues."""

    def __init__(self, config: RunConfig, paths: RunDirectory, progress: RunProgress):
        self._config = config
        self._paths = paths
        self._closed = False
        self._terminal = Terminal()
        done = self._steps_before(progress.stage) + progress.step
        self._progress = StepProgress(
            self._steps_before(len(config.stages)) - done, self._terminal, paths.run_log, command_started()
        )
        self._metrics = MetricsWriter(paths.metrics, Trackers(config.trackers, self._tracked(done), self.log), done)
        self._timeline = Timeline(paths.timeline)

    def log(self, text: str) -> None:
        """Print one line."""
        self._progress.say(text)

    def span(self, stage: str, step: int, name: str, start: float) -> None:
        """Record that `name` took from `start` (seconds since the epoch) until now."""
        self._timeline.add(Span(stage, step, name, start, time.time()))

    @contextmanager
    def rollouts(self, stage: str, step: int, traces: int) -> Iterator["RolloutsProgress"]:
        """Show how many of `traces` traces are sampled and graded, and record the spans of both."""
        with self._progress.bar(f"{stage} {step}", traces) as bar:
            progress = RolloutsProgress(bar)
            yield progress
        for span in progress.spans(stage, step):
            self._timeline.add(span)

    def step_done(self, stage: Stage, step: int, metrics: dict[str, float]) -> None:
        """Print a finished step's line and write its metrics."""
        self._metrics.write(stage.name, self._steps_before(self._config.stages.index(stage)) + step, metrics)
        self._progress.step_done(stage.name, step, stage.steps, metrics, metrics["seconds/step"])

    def sampled(self, stage: Stage, step: int, groups: Sequence[Group], problem_of: Callable[[str], str]) -> None:
        """Send some traces of a step to the trackers; `problem_of` returns the text of a problem for its id."""
        count = self._config.tracking.sample_traces
        if count and groups and self._config.trackers:
            place = self._steps_before(self._config.stages.index(stage)) + step
            self._metrics.write_table(place, sample_table(stage.name, groups, problem_of, count))

    def evaluated(self, stage: Stage | None, step: int, metrics: dict[str, float]) -> None:
        """Write the evaluation of the weights after `step` steps of `stage` (None: before the first stage)."""
        stage = self._config.stages[0] if stage is None else stage
        self._metrics.write_evaluation(stage.name, self._steps_before(self._config.stages.index(stage)) + step, metrics)

    def closing(self, evaluations: Evaluations, asserted: AssertionCounts) -> None:
        """Print the table of all evaluations, the paths of all outputs, and the counts of `debug.assertions`."""
        if evaluations:
            settings = self._config.required_evaluation
            self._terminal.print(evaluation_table(evaluations, settings.k, "held-out problems", settings.confidence))
        paths = self._paths
        for stage, phases in stage_phases(read_timeline(paths.timeline)).items():
            self.log(f"{stage}: {bottleneck(phases)}")
        if self._config.debug.assertions:
            self.log(asserted.sentence())
        if not self._config.learns:
            self.log(f"rollouts: {paths.journal} (debug.only is sampling: no update was made, and no model is written)")
            return
        self.log(f"models: {paths.models}  checkpoints: {paths.checkpoints}  metrics: {paths.metrics}")
        if "tensorboard" in self._config.trackers:
            self.log(f"curves: tensorboard --logdir {paths.tensorboard}")
        self.log(f"inspect it: exprl show {paths.root}; exprl report {paths.root} --out report.html")

    def close(self, deadline_s: float | None = None) -> None:
        """Close the files and the trackers, which get `deadline_s` seconds (None: their own deadline)."""
        if not self._closed:
            self._closed = True
            self._metrics.close(deadline_s)
            self._timeline.close()

    def _tracked(self, resumed_step: int) -> TrackedRun:
        tracking = self._config.tracking
        return TrackedRun(
            self._paths.root,
            tracking.project,
            tracking.name or self._paths.root.resolve().name,
            self._config.model_dump(mode="json"),
            resumed_step,
        )

    def _steps_before(self, stage: int) -> int:
        return sum(s.steps for s in self._config.stages[:stage])


class RolloutsProgress:
    """Counts traces as they are sampled and graded."""

    def __init__(self, bar: Bar):
        self._bar = bar
        self._start = time.time()
        self._sampled: list[float] = []
        self._graded: list[float] = []

    def sampled(self) -> None:
        """Count a finished trace."""
        self._bar.advance("sampled")
        self._sampled.append(time.time())

    def graded(self) -> None:
        """Count a graded trace; an abstention counts too."""
        self._bar.advance("graded")
        self._graded.append(time.time())

    def spans(self, stage: str, step: int) -> list[Span]:
        """Return the spans in which traces were sampled and graded."""
        return [
            Span(stage, step, SAMPLING, self._start, self._sampled[-1]),
            Span(stage, step, GRADING, self._sampled[0], self._graded[-1]),
        ]
