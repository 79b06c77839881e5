"""Where a run's metrics go besides `metrics.jsonl`."""

from typing import Literal

from pydantic import NonNegativeInt

from exprl_megatron.config.base import Config

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class TrackingConfig(Config):
    """Settings of all trackers; servers and keys are in each tracker's own environment variables."""

    project: str = "exprl-megatron"
    """W&B's and trackio's project, MLflow's experiment."""
    name: str | None = None
    """The run's name there; None: that of its directory."""
    sample_traces: NonNegativeInt = 8
    """Number of traces of each step in a table, with their problem and scores and without references."""
