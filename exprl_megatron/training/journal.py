"""The graded traces of every step, on disk before anything is learned from them.

A step that is interrupted after sampling is not sampled again: it learns from its journal, and
since the journal holds every number exactly, it learns the very same thing.
"""

import gzip
import json
import zlib
from dataclasses import asdict
from pathlib import Path

from exprl_megatron.errors import UserError
from exprl_megatron.judging.judgement import Abstained, Judgement, Scored
from exprl_megatron.rollout.group import GradedTrace, Group
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.training.directory import write_atomically


class Journal:
    """One gzipped JSON-lines file for each step of each stage; one line for each group."""

    def __init__(self, root: Path):
        self._root = root

    def path(self, stage: str, step: int) -> Path:
        """The file of one step (1-based)."""
        return self._root / stage / f"step-{step:06d}.jsonl.gz"

    def read(self, stage: str, step: int) -> list[Group] | None:
        """The groups of a step, or None where it was never sampled.

        Raises UserError where the file cannot be read back.
        """
        path = self.path(stage, step)
        if not path.is_file():
            return None
        try:
            lines = gzip.decompress(path.read_bytes()).decode().splitlines()
            return [_group(json.loads(line)) for line in lines]
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"The journal file {path} is damaged ({error}); delete it to sample that step again."
            ) from error

    def write(self, stage: str, step: int, groups: list[Group]) -> None:
        """Keep the groups of a step; complete on disk when this returns."""
        lines = [json.dumps(group_record(group), separators=(",", ":")) for group in groups]
        content = gzip.compress("\n".join(lines).encode(), compresslevel=1, mtime=0)
        write_atomically(self.path(stage, step), content)


def group_record(group: Group) -> dict:
    """A group in JSON's terms; Python's float text is exact, so numbers come back bit for bit."""
    return {
        "problem_id": group.problem_id,
        "members": [
            {
                "trace": asdict(member.trace),
                "judgement": {"kind": type(member.judgement).__name__} | asdict(member.judgement),
            }
            for member in group.members
        ],
    }


def _group(record: dict) -> Group:
    members = tuple(GradedTrace(_trace(m["trace"]), _judgement(m["judgement"])) for m in record["members"])
    return Group(record["problem_id"], members)


def _trace(record: dict) -> Trace:
    lists = ("prompt_ids", "token_ids", "log_probs")
    spans = tuple(tuple(span) for span in record["weight_versions"])
    return Trace(**record | {name: tuple(record[name]) for name in lists} | {"weight_versions": spans})


def _judgement(record: dict) -> Judgement:
    kind = {"Scored": Scored, "Abstained": Abstained}[record.pop("kind")]
    return kind(**record)
