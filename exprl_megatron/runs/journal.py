"""The rollout log (in code and configs: journal): the graded traces of every step, on disk before they are used.

A step that is interrupted after sampling is not sampled again: the resumed run reads it from the log. The log holds
every number exactly, so that the update is bit for bit the same.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from exprl_megatron.errors import UserError
from exprl_megatron.rollout.group import Group
from exprl_megatron.runs.journal_v1 import read_v1
from exprl_megatron.runs.rollout_table import SCHEMA, batch_of, groups_of, rows_of
from exprl_megatron.utils.arrow_memory import allocate_by_malloc
from exprl_megatron.utils.files import open_atomically

VERSION = 3
_READ = (2, 3)
"""The versions of files that are read; 2 has no column `routed_experts`."""
_METADATA = b"exprl"
_SPLIT = ("prompt_ids.list.element", "token_ids.list.element", "log_probs.list.element")
"""Columns whose numbers compress better when their first bytes are together, and their second, and so on."""
DAMAGE = (OSError, EOFError, zlib.error, pa.ArrowException, ValueError, KeyError, TypeError)
"""Exceptions that reading a damaged file raises."""
_ROWS, _EXPERT_BYTES = 256, 2**28
"""Traces of a row group, and bytes of experts in one, which bound the memory for copies while a step is written."""


@dataclass(frozen=True)
class SampledStep:
    """The graded groups that one step learns from."""

    groups: list[Group]
    prompts_consumed: int
    """Number of the stage's problems that were sampled; more than there are groups where some were replaced."""
    judge_counts: dict[str, int] = field(default_factory=dict)
    """Counts of the judge's requests for the step: `asked`, `reasked`, ... (see Judge), `rubric_fallbacks`."""


class Journal:
    """One Parquet file for each step of each stage, a row for each trace; docs/rollouts.md describes the columns.

    Steps that an earlier version of the program wrote are read as well.
    """

    def __init__(self, root: Path):
        self._root = root

    def path(self, stage: str, step: int) -> Path:
        """Return the file of one step (1-based)."""
        return self._root / stage / f"step-{step:06d}.parquet"

    def has(self, stage: str, step: int) -> bool:
        """Return whether the step is in the log."""
        return self.path(stage, step).is_file() or self._path_v1(stage, step).is_file()

    def steps(self, stage: str) -> list[int]:
        """Return the numbers of the logged steps of `stage`, in order."""
        names = {path.name for path in (self._root / stage).glob("step-*")}
        numbers = {int(name[5:11]) for name in names if name.endswith((".parquet", ".jsonl.gz"))}
        return sorted(numbers)

    def read(self, stage: str, step: int) -> SampledStep | None:
        """Read a step; None where it is not in the log.

        Raises:
            UserError: the file is damaged, or where a later version of the program wrote it.
        """
        path = self.path(stage, step)
        try:
            if path.is_file():
                return read_step(path)
            path = self._path_v1(stage, step)
            if not path.is_file():
                return None
            return _sampled_step(*read_v1(path.read_bytes()))
        except DAMAGE as error:
            raise UserError(
                f"The rollout log {path} is damaged ({error}); delete it to sample that step again."
            ) from error

    def write(self, stage: str, step: int, sampled: SampledStep) -> None:
        """Write a step; the file is complete on disk when this returns."""
        write_step(self.path(stage, step), sampled)

    def keep_newest(self, stage: str, step: int, count: int) -> None:
        """Delete the steps of `stage` up to `step` except the last `count` of these."""
        for old in self.steps(stage):
            if old <= step - count:
                self.path(stage, old).unlink(missing_ok=True)
                self._path_v1(stage, old).unlink(missing_ok=True)

    def _path_v1(self, stage: str, step: int) -> Path:
        return self._root / stage / f"step-{step:06d}.jsonl.gz"


def write_step(path: Path, sampled: SampledStep) -> None:
    """Write a step's traces and judgements to `path`; the file is complete on disk when this returns."""
    counts = {"version": VERSION, "problems_drawn": sampled.prompts_consumed, "judge_counts": sampled.judge_counts}
    rows = rows_of(sampled.groups)
    allocate_by_malloc()
    with (
        open_atomically(path) as file,
        pq.ParquetWriter(
            file,
            SCHEMA.with_metadata({_METADATA: json.dumps(counts)}),
            compression="zstd",
            compression_level=1,
            use_dictionary=["problem_id", "domain", "finish_reason"],
            column_encoding=dict.fromkeys(_SPLIT, "BYTE_STREAM_SPLIT"),
            write_statistics=False,
            write_page_checksum=True,
        ) as writer,
    ):
        count = _rows_of_a_group(sampled.groups)
        for start in range(0, len(rows), count):
            writer.write_batch(batch_of(rows[start : start + count]))


def read_step(path: Path) -> SampledStep:
    """Read a file of write_step.

    Raises:
        UserError: a later version of the program wrote the file, and one of DAMAGE where it is damaged.
    """
    allocate_by_malloc()
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        counts = json.loads(file.schema_arrow.metadata[_METADATA])
        version = counts.pop("version")
        if version not in _READ:
            raise UserError(
                f"The rollout log {path} has version {version}, and this program reads version {VERSION}; resume with "
                f"the program that wrote it, or delete the file to sample that step again."
            )
        parts = (file.read_row_group(number, use_threads=False) for number in range(file.num_row_groups))
        return _sampled_step(groups_of(parts), counts)


def _rows_of_a_group(groups: Sequence[Group]) -> int:
    experts = (member.trace.routed_experts for group in groups for member in group.samples)
    largest = max((array.nbytes for array in experts if array is not None), default=0)
    return max(1, min(_ROWS, _EXPERT_BYTES // max(largest, 1)))


def _sampled_step(groups: list[Group], counts: dict) -> SampledStep:
    """Build a step from its groups and the counts under the names that files have for them."""
    return SampledStep(groups, counts["problems_drawn"], counts.get("judge_counts", {}))
