"""Trackers: services and files that show a run's metrics in addition to metrics.jsonl.

Each tracker has a thread of its own, so that neither a slow nor a dead service delays a step. One that fails is
reported once and left out from then on. A resumed run passes on all that metrics.jsonl has kept, and each tracker takes
what it does not have: a process that is killed leaves neither a step that is missing nor one that is there twice.
"""

import importlib
import importlib.util
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from exprl_megatron.config.tracking import TrackerName

_CLOSE_S = 60.0
_WAITING = 1_000
"""The most records that wait for a tracker; further ones are left out for it."""


@dataclass(frozen=True)
class TrackedRun:
    """The description of a run with which a tracker is opened."""

    directory: Path
    """Where trackers keep files, and the ids by which they find the run again when it is resumed."""
    project: str
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    resumed_step: int = 0
    """The last step that the resumed run has behind it, over all stages; 0 for a new run."""


@dataclass(frozen=True)
class SampleTable:
    """Some traces of a step: a header, and one row for each."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]


class Tracker(Protocol):
    """One service; all calls come from one thread."""

    def last_step(self, tag: str) -> int:
        """Return the last step at which the service has `tag` from former attempts of the run; -1 without any."""

    def last_table_step(self, name: str) -> int:
        """Return the last step of the tables of that name; -1 without any."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show `values` by tag at `step`, which counts over all stages."""

    def log_table(self, step: int, table: SampleTable) -> None:
        """Show a table of traces."""

    def close(self) -> None:
        """Finish; what was logged is on disk or sent when this returns."""


def missing_packages(names: Sequence[TrackerName]) -> list[str]:
    """Return one sentence for each tracker of `names` whose package, which has the tracker's name, is not installed."""
    return [
        f"trackers has {name}, whose package is not installed; install it with "
        f"`pip install 'exprl-megatron[{name}]'`, or leave it out."
        for name in names
        if importlib.util.find_spec(name) is None
    ]


def open_tracker(name: TrackerName, run: TrackedRun) -> Tracker:
    """Open the tracker of that name; its package is imported here and nowhere else."""
    module = importlib.import_module(f"exprl_megatron.reporting.{name}_tracker")
    return module.open_run(run)


class Trackers:
    """Passes records to trackers, each in its own thread. `report` is given a line about one that failed."""

    def __init__(
        self,
        names: Sequence[TrackerName],
        run: TrackedRun,
        report: Callable[[str], None],
        open_one: Callable[[TrackerName, TrackedRun], Tracker] = open_tracker,
    ):
        self._threads = [_TrackerThread(name, partial(open_one, name, run), report) for name in names]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Pass on `values` by tag; returns at once."""
        self.log_all([(step, values)])

    def log_all(self, records: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Pass on what several steps have by tag, in their order; returns at once."""
        for thread in self._threads:
            thread.put(lambda tracker: _log_missing(tracker, records))

    def log_table(self, step: int, table: SampleTable) -> None:
        """Pass on a table; returns at once."""
        for thread in self._threads:
            thread.put(lambda tracker: _log_missing_table(tracker, step, table))

    def close(self, deadline_s: float = _CLOSE_S) -> None:
        """Wait for every tracker; one that does not finish within `deadline_s` is reported and abandoned."""
        for thread in self._threads:
            thread.put_end()
        for thread in self._threads:
            thread.join(deadline_s)


def _log_missing(tracker: Tracker, records: Sequence[tuple[int, Mapping[str, float]]]) -> None:
    """Log what the tracker does not have: a resumed run repeats the steps after its checkpoint."""
    for step, values in records:
        missing = {tag: value for tag, value in values.items() if step > tracker.last_step(tag)}
        if missing:
            tracker.log(step, missing)


def _log_missing_table(tracker: Tracker, step: int, table: SampleTable) -> None:
    if step > tracker.last_table_step(table.name):
        tracker.log_table(step, table)


class _TrackerThread:
    """Opens one tracker, and calls it in the order of the calls here."""

    def __init__(self, name: str, open_one: Callable[[], Tracker], report: Callable[[str], None]):
        self._name = name
        self._open_one = open_one
        self._report = report
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue()
        self._failed = threading.Event()
        self._reported = threading.Lock()
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, call: Callable[[Tracker], None]) -> None:
        if self._failed.is_set():
            return
        if self._calls.qsize() >= _WAITING:
            self._fail(f"has not taken {_WAITING} records in a row")
            return
        self._calls.put(call)

    def put_end(self) -> None:
        self._calls.put(None)

    def join(self, deadline_s: float) -> None:
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            self._fail(f"has not taken its last records within {deadline_s:g} s")

    def _work(self) -> None:
        try:
            tracker = self._open_one()
            while (call := self._calls.get()) is not None and not self._failed.is_set():
                call(tracker)
            tracker.close()
        except BaseException as error:  # a client's SystemExit, or the panic of one that is written in Rust
            words = " ".join(str(error).split())
            self._fail(f"failed ({type(error).__name__}{': ' * bool(words)}{words[:300]})")

    def _fail(self, how: str) -> None:
        """Report once that the tracker is left out from now on."""
        with self._reported:
            if self._failed.is_set():
                return
            self._failed.set()
        self._report(f"tracker {self._name} {how}; it is left out, and metrics.jsonl has every step.")
