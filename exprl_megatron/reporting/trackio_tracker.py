"""trackio, in TRACKIO_DIR on this machine, or where trackio's own variables say."""

import uuid
from collections.abc import Mapping

import trackio
from trackio.sqlite_storage import SQLiteStorage

from exprl_megatron.reporting.tracker_ids import store_id, stored_id
from exprl_megatron.reporting.trackers import SampleTable, TrackedRun


class TrackioTracker:
    """Logs to trackio, which finds a run again by its name: a new run gets a name that no other run has."""

    def __init__(self, run: TrackedRun):
        name = stored_id(run.directory, "trackio")
        self._last: dict[str, int] = {}
        if name is None:
            name = f"{run.name}-{uuid.uuid4().hex[:6]}"
            store_id(run.directory, "trackio", name)
        else:
            for row in SQLiteStorage.get_logs(run.project, name):
                self._last |= {tag: max(row["step"], self._last.get(tag, -1)) for tag in row}
        self._run = trackio.init(
            project=run.project,
            name=name,
            config=dict(run.config),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def last_step(self, tag: str) -> int:
        """Return the last step of `tag` in former attempts of the run; -1 without any."""
        return self._last.get(tag, -1)

    def last_table_step(self, name: str) -> int:
        """Return the last step of the tables of that name in former attempts; -1 without any."""
        return self._last.get(name, -1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log `values` by tag at `step`, which counts over all stages."""
        self._run.log(dict(values), step=step)

    def log_table(self, step: int, table: SampleTable) -> None:
        """Log a table of traces at `step`."""
        # This import is slow, and only tables need it.
        import pandas

        frame = pandas.DataFrame(list(table.rows), columns=list(table.columns))
        self._run.log({table.name: trackio.Table(dataframe=frame)}, step=step)

    def close(self) -> None:
        """Finish: what was logged is on disk or sent when this returns."""
        self._run.finish()


def open_run(run: TrackedRun) -> TrackioTracker:
    """Open the tracker."""
    return TrackioTracker(run)
