"""Terminal output of a run: a line for each step, progress bars within a step, the remaining time."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from exprl_megatron.reporting.run_log import RunLog, duration
from exprl_megatron.reporting.step_line import WIDTH, step_line

_STAMP = len("[12:34:56] ")
_NAME = 20
"""Longer names of stages are cut in a step's line."""


class Bar:
    """Progress bars of the work within a step; `advance` must be called from one thread."""

    def __init__(self, progress: Progress | None, total: int):
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._total = total

    def advance(self, what: str) -> None:
        """Count one more of `what` (for example "sampled", "graded") as done; each has a bar of its own."""
        if self._progress is None:
            return
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=self._total)
        self._progress.advance(self._tasks[what])


class StepProgress:
    """Writes to `console`, and its lines to `log` too; without a terminal there are no bars and lines stay plain.

    `steps` is how many steps this process has before it, over all stages; the time left is the mean
    time of the steps done so far, times those that remain. `started` is when the run's command started (seconds since
    the epoch).
    """

    def __init__(
        self, steps: int, console: Console | None = None, log: Path | None = None, started: float | None = None
    ):
        self._console = console or Console()
        self._log = RunLog(started, self._print)
        if log is not None:
            self._log.keep(log)
        self._steps = steps
        self._done = 0
        self._seconds = 0.0
        self._shown = False

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Bar]:
        """Show bars, each up to `total`, that vanish when the block ends; work that runs during other work has none."""
        if self._shown or not self._console.is_terminal:
            yield Bar(None, total)
            return
        self._shown = True
        columns = (TextColumn(f"{name} {{task.description}}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        try:
            with Progress(*columns, console=self._console, transient=True) as progress:
                yield Bar(progress, total)
        finally:
            self._shown = False

    def step_done(self, stage: str, step: int, of: int, metrics: Mapping[str, float], seconds: float) -> None:
        """Print the line of a finished step: step `step` (1-based) of the `of` steps of its stage."""
        self._done += 1
        self._seconds += seconds
        left = self._seconds / self._done * max(0, self._steps - self._done)
        end = f"{seconds:.{1 if seconds < 100 else 0}f} s, {duration(left)} left"
        name = stage if len(stage) <= _NAME else f"{stage[: _NAME - 2]}.."
        self.say(step_line(f"{name} {step}/{of}", metrics, end, WIDTH - _STAMP))

    def say(self, text: str) -> None:
        """Print one line, with the time since the start of the command."""
        self._log.say(text)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
