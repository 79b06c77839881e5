"""Weights & Biases. WANDB_MODE=offline keeps everything in RUN/wandb for `wandb sync`; see wandb's own variables."""

import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

import wandb

from exprl_megatron.reporting.tags import EVALUATION
from exprl_megatron.reporting.tracker_ids import store_id, stored_id
from exprl_megatron.reporting.trackers import SampleTable, TrackedRun

_STEP = "step"
_LAST = "logged"
_TRAINED, _EVALUATED, _TABLE = f"{_LAST}/step", f"{_LAST}/evaluation", f"{_LAST}/table"
"""The steps of the last record of each kind, in W&B's summary, which a resumed run receives."""


class WandbTracker:
    """Logs to W&B; every metric is over `step`, not over W&B's own counter, which cannot go back when a run is resumed.

    `wandb sync` replaces what a former offline directory of the run has sent, and a killed process leaves its last
    32 KiB unwritten. So a resumed run's new directory has all steps, and the former ones are moved away.
    """

    def __init__(self, run: TrackedRun):
        identifier = stored_id(run.directory, "wandb")
        if identifier is None:
            identifier = uuid.uuid4().hex[:16]
            store_id(run.directory, "wandb", identifier)
        _move_away((run.directory / "wandb").glob(f"offline-run-*-{identifier}"), run.directory / "wandb-former")
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=identifier,
            # An attempt that did not get through has left none there.
            resume="allow",
            dir=str(run.directory),
            config=dict(run.config),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric(_STEP, hidden=True)
        self._run.define_metric(f"{_LAST}/*", hidden=True)
        self._run.define_metric("*", step_metric=_STEP)
        self._last: dict[str, int] = {}

    def last_step(self, tag: str) -> int:
        """Return the last step of `tag` in former attempts of the run; -1 without any."""
        return self._last_of(_kind(tag))

    def last_table_step(self, name: str) -> int:
        """Return the last step of the tables of that name in former attempts; -1 without any."""
        return self._last_of(_TABLE)

    def _last_of(self, kind: str) -> int:
        if kind not in self._last:
            self._last[kind] = -1 if self._run.offline else int(self._run.summary.get(kind, -1))
        return self._last[kind]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log `values` by tag at `step`, which counts over all stages."""
        self._run.log({_STEP: step, **{_kind(tag): step for tag in values}, **values})

    def log_table(self, step: int, table: SampleTable) -> None:
        """Log a table of traces at `step`."""
        shown = wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
        self._run.log({_STEP: step, _TABLE: step, table.name: shown})

    def close(self) -> None:
        """Finish: what was logged is on disk or sent when this returns."""
        self._run.finish()


def _kind(tag: str) -> str:
    return _EVALUATED if tag.startswith(EVALUATION) else _TRAINED


def _move_away(directories: Iterable[Path], place: Path) -> None:
    for directory in list(directories):
        place.mkdir(exist_ok=True)
        # W&B names a directory by the second.
        number = len(list(place.glob(f"{directory.name}*")))
        directory.rename(place / f"{directory.name}{f'.{number}' if number else ''}")


def open_run(run: TrackedRun) -> WandbTracker:
    """Open the tracker."""
    return WandbTracker(run)
