"""TensorBoard's files in RUN/tensorboard."""

from collections.abc import Mapping

import yaml
from torch.utils.tensorboard import SummaryWriter

from exprl_megatron.reporting.trackers import SampleTable, TrackedRun


class TensorBoardTracker:
    """Scalars, the config and tables of traces as text; steps after the resumed one are taken out first."""

    def __init__(self, run: TrackedRun):
        self._board = SummaryWriter(str(run.directory / "tensorboard"), purge_step=run.resumed_step + 1)
        if run.config and not run.resumed_step:
            self._board.add_text("config", f"```yaml\n{yaml.safe_dump(dict(run.config), sort_keys=False)}\n```", 0)
        self._board.flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def log_table(self, step: int, table: SampleTable) -> None:
        lines = [table.columns, ["---"] * len(table.columns), *table.rows]
        text = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
        self._board.add_text(table.name, text, step)
        self._board.flush()

    def close(self) -> None:
        self._board.close()


def _cell(value: object) -> str:
    """A value as text without markup, in one line of a Markdown table."""
    text = "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    for sign in "\\`*_{}[]<>#|":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\r", "").replace("\n", " \u23ce ")


def open_run(run: TrackedRun) -> TensorBoardTracker:
    """Open the tracker."""
    return TensorBoardTracker(run)
