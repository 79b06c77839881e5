"""MLflow, at MLFLOW_TRACKING_URI, or without one in files in RUN/mlflow."""

import math
import os
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from exprl_megatron.reporting.tags import EVALUATION
from exprl_megatron.reporting.tracker_ids import store_id, stored_id
from exprl_megatron.reporting.trackers import SampleTable, TrackedRun

_FORBIDDEN = re.compile(r"[^\w\-./ ]", re.ASCII)
_BATCH = 1_000
"""MLflow's limit for one request."""
_TABLE = "step-"
_OWN_ID = "exprl_megatron.run"
"""The tag by which a run is found that was created when a process was killed."""


class MlflowTracker:
    """Logs to MLflow; numbers that are not finite are left out, since not every store of MLflow accepts them."""

    def __init__(self, run: TrackedRun):
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            # MLflow uses plain files only on request; its databases need packages that we do not depend on.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (run.directory / "mlflow").absolute().as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        self._id = stored_id(run.directory, "mlflow") or self._find_or_create(run)
        self._client.update_run(self._id, status="RUNNING")
        self._last: dict[str, int] = {}

    def _find_or_create(self, run: TrackedRun) -> str:
        own = stored_id(run.directory, _OWN_ID)
        experiment = self._experiment(run.project)
        if own is None:
            own = uuid.uuid4().hex
            store_id(run.directory, _OWN_ID, own)
        found = self._client.search_runs([experiment], f"tags.`{_OWN_ID}` = '{own}'")
        created = found[0] if found else self._client.create_run(experiment, tags={_OWN_ID: own}, run_name=run.name)
        self._client.log_dict(created.info.run_id, dict(run.config), "config.yaml")
        store_id(run.directory, "mlflow", created.info.run_id)
        return created.info.run_id

    def _experiment(self, name: str) -> str:
        if (found := self._client.get_experiment_by_name(name)) is not None:
            return found.experiment_id
        try:
            return self._client.create_experiment(name)
        except MlflowException:
            # Another run may have made it in the meantime.
            if (found := self._client.get_experiment_by_name(name)) is None:
                raise
            return found.experiment_id

    def last_step(self, tag: str) -> int:
        """Return the last step of `tag` in former attempts of the run; -1 without any."""
        if tag not in self._last:
            history = self._client.get_metric_history(self._id, mlflow_name(tag))
            self._last[tag] = max((metric.step for metric in history), default=-1)
        return self._last[tag]

    def last_table_step(self, name: str) -> int:
        """Return the last step of the tables of that name in former attempts; -1 without any."""
        found = [Path(artifact.path).stem for artifact in self._client.list_artifacts(self._id, name)]
        return max((int(stem.removeprefix(_TABLE)) for stem in found), default=-1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log `values` by tag at `step`, which counts over all stages."""
        now = int(time.time() * 1000)
        metrics = [Metric(mlflow_name(n), v, now, step) for n, v in values.items() if math.isfinite(v)]
        for first in range(0, len(metrics), _BATCH):
            self._client.log_batch(self._id, metrics=metrics[first : first + _BATCH])

    def log_table(self, step: int, table: SampleTable) -> None:
        """Log a table of traces at `step`."""
        columns = {name: [row[i] for row in table.rows] for i, name in enumerate(table.columns)}
        self._client.log_table(self._id, columns, f"{table.name}/{_TABLE}{step:06}.json")

    def close(self) -> None:
        """Finish: what was logged is on disk or sent when this returns."""
        self._client.set_terminated(self._id)


def mlflow_name(tag: str) -> str:
    """Return `tag` in the letters that MLflow takes, with a group and perhaps a stage in front.

    In a file store one name must not be a folder of another: `evaluation/pass@1/low` becomes
    `evaluation/pass_at_1.low`.
    """
    groups = 1 if tag.startswith(EVALUATION) else 2
    parts = tag.split("/")
    name = "/".join([*parts[:groups], ".".join(parts[groups:])])
    return _FORBIDDEN.sub("_", name.replace("@", "_at_"))


def open_run(run: TrackedRun) -> MlflowTracker:
    """Open the tracker."""
    return MlflowTracker(run)
