"""Terminal output of a run: a line for each step, progress bars within a step, the remaining time."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SHOWN_METRICS = (
    "reward/mean",
    "reward/groups_with_success",
    "loss",
    "kl/start",
    "entropy",
    "length/mean",
    "reward/abstained",
    "grad_norm",
)


class Bar:
    """Progress bars of the work within a step; `advance` must be called from one thread."""

    def __init__(self, progress: Progress | None, total: int):
        self._progress = progress
        self._tasks = {}
        self._total = total

    def advance(self, what: str) -> None:
        """One more of `what` (for example "sampled", "graded") is done; each has a bar of its own."""
        if self._progress is None:
            return
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=self._total)
        self._progress.advance(self._tasks[what])


class StepProgress:
    """Writes to `console`; on anything but a terminal the bars are left out and lines stay plain.

    `steps` is how many steps this process has before it, over all stages; the time left is the mean
    time of the steps done so far, times those that remain.
    """

    def __init__(self, steps: int, console: Console | None = None):
        self._console = console or Console()
        self._steps = steps
        self._done = 0
        self._seconds = 0.0
        self._began = time.monotonic()
        self._shown = False

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Bar]:
        """Bars, each up to `total`, that vanish when the block ends; work beside other work has none."""
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
        """The line of a finished step: step `step` (1-based) of the `of` steps of its stage."""
        self._done += 1
        self._seconds += seconds
        left = self._seconds / self._done * max(0, self._steps - self._done)
        shown = [f"{name} {metrics[name]:.4g}" for name in SHOWN_METRICS if name in metrics]
        parts = [f"{stage} {step}/{of}", *shown, f"{seconds:.1f} s", f"{duration(left)} left"]
        self.say(" | ".join(parts))

    def say(self, text: str) -> None:
        """One line, with the time since the start of this process's work."""
        stamp = duration(time.monotonic() - self._began)
        self._console.print(f"[{stamp}] {text}", markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
