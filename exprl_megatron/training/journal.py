"""The graded traces of every step, on disk before anything is learned from them.

A step that is interrupted after sampling is not sampled again: it learns from its journal, and
since the journal holds every number exactly, it learns the very same thing.
"""

import gzip
import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

from exprl_megatron.errors import UserError
from exprl_megatron.judging.judgement import Abstained, Judgement, Scored, judgement_record
from exprl_megatron.rollout.group import GradedTrace, Group, JudgedSegment
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.training.directory import write_atomically


@dataclass(frozen=True)
class SampledStep:
    """What one step learns from."""

    groups: list[Group]
    problems_drawn: int
    """From the stage's problems; more than there are groups where some were replaced."""
    judge_counts: dict[str, int] = field(default_factory=dict)
    """What it took to have the step judged: requests `asked`, `reasked`, ... (see Judge), `rubric_fallbacks`."""


class Journal:
    """One gzipped JSON-lines file for each step of each stage; after a first line of counts one for each group."""

    def __init__(self, root: Path):
        self._root = root

    def path(self, stage: str, step: int) -> Path:
        """The file of one step (1-based)."""
        return self._root / stage / f"step-{step:06d}.jsonl.gz"

    def steps(self, stage: str) -> list[int]:
        """The steps of `stage` that are in the journal, in order."""
        return sorted(int(path.name[5:11]) for path in (self._root / stage).glob("step-*.jsonl.gz"))

    def read(self, stage: str, step: int) -> SampledStep | None:
        """A step, or None where it was never sampled.

        Raises UserError where the file cannot be read back.
        """
        path = self.path(stage, step)
        if not path.is_file():
            return None
        try:
            counts, *lines = gzip.decompress(path.read_bytes()).decode().splitlines()
            return SampledStep([_group(json.loads(line)) for line in lines], **json.loads(counts))
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"The journal file {path} is damaged ({error}); delete it to sample that step again."
            ) from error

    def write(self, stage: str, step: int, sampled: SampledStep) -> None:
        """Keep a step; complete on disk when this returns."""
        counts = {"problems_drawn": sampled.problems_drawn, "judge_counts": sampled.judge_counts}
        records = [counts, *map(group_record, sampled.groups)]
        lines = [json.dumps(record, separators=(",", ":")) for record in records]
        content = gzip.compress("\n".join(lines).encode(), compresslevel=1, mtime=0)
        write_atomically(self.path(stage, step), content)


def group_record(group: Group) -> dict:
    """A group in JSON's terms; Python's float text is exact, so numbers come back bit for bit."""
    return {"problem_id": group.problem_id, "domain": group.domain, "members": list(map(_member, group.members))}


def _member(member: GradedTrace) -> dict:
    return {
        "trace": asdict(member.trace),
        "judgement": judgement_record(member.judgement),
        "segments": [[s.start, s.end, judgement_record(s.judgement)] for s in member.segments],
        "verified": None if member.verified is None else judgement_record(member.verified),
    }


def _group(record: dict) -> Group:
    members = tuple(
        GradedTrace(
            trace=_trace(member["trace"]),
            judgement=_judgement(member["judgement"]),
            segments=tuple(JudgedSegment(start, end, _judgement(j)) for start, end, j in member["segments"]),
            verified=None if member["verified"] is None else _judgement(member["verified"]),
        )
        for member in record["members"]
    )
    return Group(record["problem_id"], members, record["domain"])


def _trace(record: dict) -> Trace:
    lists = ("prompt_ids", "token_ids", "log_probs")
    spans = tuple(tuple(span) for span in record["weight_versions"])
    return Trace(**record | {name: tuple(record[name]) for name in lists} | {"weight_versions": spans})


def _judgement(record: dict) -> Judgement:
    kind = {"Scored": Scored, "Abstained": Abstained}[record.pop("kind")]
    return kind(**record)
