"""MLflow, at MLFLOW_TRACKING_URI, or without one in files in RUN/mlflow."""

import math
import os
import re
import time
from collections.abc import Mapping

from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from exprl_megatron.reporting.tags import EVALUATION
from exprl_megatron.reporting.tracker_ids import store_id, stored_id
from exprl_megatron.reporting.trackers import SampleTable, TrackedRun

_FORBIDDEN = re.compile(r"[^\w\-./ ]", re.ASCII)
_BATCH = 1_000
"""MLflow's limit for one request."""


class MlflowTracker:
    """Numbers that are not finite are left out: not every store of MLflow takes them."""

    def __init__(self, run: TrackedRun):
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            # MLflow wants to be asked for plain files; its databases need packages that we do not.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (run.directory / "mlflow").absolute().as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        self._id = stored_id(run.directory, "mlflow") or self._create(run)
        self._client.update_run(self._id, status="RUNNING")

    def _create(self, run: TrackedRun) -> str:
        created = self._client.create_run(self._experiment(run.project), run_name=run.name)
        store_id(run.directory, "mlflow", created.info.run_id)
        self._client.log_dict(created.info.run_id, dict(run.config), "config.yaml")
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

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(mlflow_name(n), v, now, step) for n, v in values.items() if math.isfinite(v)]
        for first in range(0, len(metrics), _BATCH):
            self._client.log_batch(self._id, metrics=metrics[first : first + _BATCH])

    def log_table(self, step: int, table: SampleTable) -> None:
        columns = {name: [row[i] for row in table.rows] for i, name in enumerate(table.columns)}
        self._client.log_table(self._id, columns, f"{table.name}/step-{step:06}.json")

    def close(self) -> None:
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
