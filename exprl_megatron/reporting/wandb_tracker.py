"""Weights & Biases. WANDB_MODE=offline keeps everything in RUN/wandb for `wandb sync`; see wandb's own variables."""

import uuid
from collections.abc import Mapping

import wandb

from exprl_megatron.reporting.tracker_ids import store_id, stored_id
from exprl_megatron.reporting.trackers import SampleTable, TrackedRun

_STEP = "step"


class WandbTracker:
    """Every metric is over `step`, not over W&B's own counter, which refuses to go back when a run is resumed."""

    def __init__(self, run: TrackedRun):
        # An attempt that did not get through may have left none.
        identifier = stored_id(run.directory, "wandb") or uuid.uuid4().hex[:16]
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=identifier,
            resume="allow",
            dir=str(run.directory),
            config=dict(run.config),
            settings=wandb.Settings(console="off", silent=True),
        )
        store_id(run.directory, "wandb", identifier)
        self._run.define_metric(_STEP, hidden=True)
        self._run.define_metric("*", step_metric=_STEP)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({_STEP: step, **values})

    def log_table(self, step: int, table: SampleTable) -> None:
        shown = wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
        self._run.log({_STEP: step, table.name: shown})

    def close(self) -> None:
        self._run.finish()


def open_run(run: TrackedRun) -> WandbTracker:
    """Open the tracker."""
    return WandbTracker(run)
