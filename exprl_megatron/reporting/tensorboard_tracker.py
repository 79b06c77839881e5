"""TensorBoard's files in RUN/tensorboard."""

from collections.abc import Mapping
from pathlib import Path

import yaml
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog
from torch.utils.tensorboard import SummaryWriter

from exprl_megatron.reporting.trackers import SampleTable, TrackedRun

_CONFIG = "config"
_TEXT = "/text_summary"
"""What TensorBoard appends to the tag of a text."""


class TensorBoardTracker:
    """Logs scalars, the config, and tables of traces as text; steps after the resumed one are removed first."""

    def __init__(self, run: TrackedRun):
        directory = run.directory / "tensorboard"
        self._last = _before(run.resumed_step + 1, _last_steps(directory))
        self._board = SummaryWriter(str(directory), purge_step=run.resumed_step + 1)
        if run.config and self.last_table_step(_CONFIG) < 0:
            self._board.add_text(_CONFIG, f"```yaml\n{yaml.safe_dump(dict(run.config), sort_keys=False)}\n```", 0)
        self._board.flush()

    def last_step(self, tag: str) -> int:
        """Return the last step of `tag` in former attempts of the run; -1 without any."""
        return self._last.get(tag, -1)

    def last_table_step(self, name: str) -> int:
        """Return the last step of the tables of that name in former attempts; -1 without any."""
        return self._last.get(name + _TEXT, -1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log `values` by tag at `step`, which counts over all stages."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def log_table(self, step: int, table: SampleTable) -> None:
        """Log a table of traces at `step`."""
        lines = [table.columns, ["---"] * len(table.columns), *table.rows]
        text = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
        self._board.add_text(table.name, text, step)
        self._board.flush()

    def close(self) -> None:
        """Finish: what was logged is on disk or sent when this returns."""
        self._board.close()


def _last_steps(directory: Path) -> dict[str, int]:
    """Return the last step of each tag in a directory's files, without what a later file removes.

    A file that a killed process left ends where it is torn.
    """
    last: dict[str, int] = {}
    for file in sorted(directory.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(file)).Load():
            if event.session_log.status == SessionLog.START:
                last = _before(event.step, last)
            last |= {value.tag: event.step for value in event.summary.value}
    return last


def _before(purge_step: int, last: dict[str, int]) -> dict[str, int]:
    """Return `last` after a file that begins at `purge_step`: TensorBoard removes later scalars, but no text."""
    return {tag: step if tag.endswith(_TEXT) else min(step, purge_step - 1) for tag, step in last.items()}


def _cell(value: object) -> str:
    """Return a value as text without markup, in one line of a Markdown table."""
    text = "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    for sign in "\\`*_{}[]<>#|":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\r", "").replace("\n", " \u23ce ")


def open_run(run: TrackedRun) -> TensorBoardTracker:
    """Open the tracker in the run's directory."""
    return TensorBoardTracker(run)
