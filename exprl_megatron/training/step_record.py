"""What is measured of a step: its seconds, its spans in the timeline, and what its parts report of it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from exprl_megatron.reporting.timeline import STEP
from exprl_megatron.training.run_logger import RunLogger


class StepRecord:
    """The step in progress on one rank; `logger`, which only rank 0 has, writes the spans."""

    def __init__(self, logger: RunLogger | None):
        self.place = ("", 0)
        """Name of the stage, and number of the step."""
        self.updates = 0
        """How many updates of the step have been started."""
        self.counts: dict[str, float] = {}
        """Metrics of the step's traces."""
        self._sync_metrics: dict[str, float] = {}
        self._logger = logger
        self._seconds: dict[str, float] = {}
        self._started = self._started_at = 0.0

    def begin(self, stage: str, step: int) -> None:
        """Begin step `step` of `stage`."""
        self._started, self._started_at = time.monotonic(), time.time()
        self.place, self.updates = (stage, step), 0
        self._seconds, self.counts = {}, {}

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to the metric `seconds/NAME`, and write a span of the timeline."""
        started, at = time.monotonic(), time.time()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - started
        self._write_span(name, at)

    def synced(self, metrics: dict[str, float]) -> None:
        """Keep the metrics of a weight sync for the step in progress, or for the next one.

        A sync that had nothing to send, since the servers had the version, has no metrics and replaces none.
        """
        self._sync_metrics = metrics or self._sync_metrics

    def finish(self) -> dict[str, float]:
        """Return all metrics of the step, with `seconds/step`."""
        metrics = self.counts | self._sync_metrics
        self._sync_metrics = {}
        metrics |= {f"seconds/{name}": value for name, value in self._seconds.items()}
        metrics["seconds/step"] = time.monotonic() - self._started
        self._write_span(STEP, self._started_at)
        return metrics

    def _write_span(self, name: str, start: float) -> None:
        if self._logger is not None:
            self._logger.span(*self.place, name, start)
