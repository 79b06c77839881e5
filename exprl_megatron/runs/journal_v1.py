"""Reads the rollout log's first format: gzipped JSON lines, a line of counts and then one for each group."""

import gzip
import json

from exprl_megatron.judging.judgement import Abstained, Judgement, Scored
from exprl_megatron.rollout.group import GradedTrace, Group, JudgedSegment
from exprl_megatron.rollout.trace import Trace


def read_v1(content: bytes) -> tuple[list[Group], dict]:
    """Return the groups of a step and its counts; Python's float text is exact, so numbers come back bit for bit.

    Raises OSError, EOFError, zlib.error, ValueError, KeyError or TypeError where `content` is damaged.
    """
    counts, *lines = gzip.decompress(content).decode().splitlines()
    return [_group(json.loads(line)) for line in lines], json.loads(counts)


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
    return Trace(**record | {"weight_versions": tuple(tuple(span) for span in record["weight_versions"])})


def _judgement(record: dict) -> Judgement:
    kind = {"Scored": Scored, "Abstained": Abstained}[record.pop("kind")]
    return kind(**record)
