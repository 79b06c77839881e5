"""The trainer's log-probs of the rollout log's tokens, on disk: a directory of Parquet files for each step.

Every data-parallel rank writes its own part. A step's directory gets its name when all parts are in it, so that a step
is there whole or not at all. docs/rollouts.md describes the columns.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from exprl_megatron.errors import UserError
from exprl_megatron.runs.journal import DAMAGE
from exprl_megatron.utils.files import open_atomically, sync_directory

VERSION = 1
SCHEMA = pa.schema(
    [("group", pa.int32()), ("sample", pa.int32()), ("trainer_log_probs", pa.list_(pa.float32()))],
    metadata={b"exprl": json.dumps({"version": VERSION})},
)
_ROWS = 1024
_POLL_S = 0.1
_UNFINISHED = ".tmp"


@dataclass(frozen=True)
class TraceLogProbs:
    """The trainer's log-probs of one trace."""

    group: int
    sample: int
    log_probs: np.ndarray
    """[response tokens], float32, in nats."""


class TrainerLogProbFiles:
    """The files below `root`, which every rank reaches."""

    def __init__(self, root: Path):
        self._root = root

    def directory(self, stage: str, step: int) -> Path:
        """Return the directory of the complete files of a step (1-based)."""
        return self._root / stage / f"step-{step:06d}"

    def write_part(self, stage: str, step: int, part: tuple[int, int], rows: Sequence[TraceLogProbs]) -> None:
        """Write part N of M (`part`) of a step; it is on disk when this returns."""
        path = self._unfinished(stage, step) / "part-{:05d}-of-{:05d}.parquet".format(*part)
        with (
            open_atomically(path) as file,
            pq.ParquetWriter(
                file,
                SCHEMA,
                compression="zstd",
                compression_level=1,
                use_dictionary=False,
                column_encoding={"trainer_log_probs.list.element": "BYTE_STREAM_SPLIT"},
                write_statistics=False,
                write_page_checksum=True,
            ) as writer,
        ):
            for start in range(0, len(rows), _ROWS):
                writer.write_batch(_batch(rows[start : start + _ROWS]))

    def publish(self, stage: str, step: int, parts: int, deadline_s: float) -> None:
        """Give a step's directory its name as soon as all `parts` are there; replaces what an earlier attempt left.

        Raises:
            UserError: that takes longer than `deadline_s`.
        """
        source, target = self._unfinished(stage, step), self.directory(stage, step)
        end = time.monotonic() + deadline_s
        while (found := len(list(source.glob(f"part-*-of-{parts:05d}.parquet")))) < parts:
            if time.monotonic() > end:
                raise UserError(
                    f"Only {found} of {parts} ranks have written the trainer's log-probs of step {step} of {stage} to "
                    f"{source} within {deadline_s:g} s; see that all nodes reach that directory, or set "
                    "journal.trainer_log_probs to false."
                )
            time.sleep(_POLL_S)
        shutil.rmtree(target, ignore_errors=True)
        source.rename(target)
        sync_directory(target.parent)

    def discard_unfinished(self) -> None:
        """Delete the parts of steps that an interrupted run has not completed."""
        for path in self._root.glob(f"*/step-*{_UNFINISHED}"):
            shutil.rmtree(path, ignore_errors=True)

    def read(self, stage: str, step: int) -> dict[tuple[int, int], np.ndarray] | None:
        """Return the log-probs of each trace by (group, sample): float32 [response tokens]; None where the step has
        none.

        Raises:
            UserError: a file is damaged.
        """
        directory = self.directory(stage, step)
        if not directory.is_dir():
            return None
        found: dict[tuple[int, int], np.ndarray] = {}
        for path in sorted(directory.glob("*.parquet")):
            try:
                table = pq.read_table(path, page_checksum_verification=True).combine_chunks()
                columns = [table[name].to_pylist() for name in ("group", "sample")]
                values = [np.from_dlpack(row.values) for row in table["trainer_log_probs"]]
            except DAMAGE as error:
                raise UserError(f"The file {path} is damaged ({error}); delete the directory {directory}.") from error
            found |= zip(zip(*columns, strict=True), values, strict=True)
        return found

    def keep_newest(self, stage: str, step: int, count: int) -> None:
        """Delete the steps of `stage` up to `step` except the last `count` of these."""
        for path in (self._root / stage).glob("step-*"):
            if path.suffix != _UNFINISHED and int(path.name.removeprefix("step-")) <= step - count:
                shutil.rmtree(path, ignore_errors=True)

    def _unfinished(self, stage: str, step: int) -> Path:
        directory = self.directory(stage, step)
        return directory.with_name(directory.name + _UNFINISHED)


def _batch(rows: Sequence[TraceLogProbs]) -> pa.RecordBatch:
    offsets = np.fromiter(accumulate((len(row.log_probs) for row in rows), initial=0), np.int32, len(rows) + 1)
    values = np.concatenate([row.log_probs for row in rows])
    columns = [
        pa.array([row.group for row in rows], pa.int32()),
        pa.array([row.sample for row in rows], pa.int32()),
        pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, pa.float32())),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
