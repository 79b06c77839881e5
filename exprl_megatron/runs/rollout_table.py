"""Graded traces as rows of a Parquet file, and back, without a Python object for every token.

docs/rollouts.md describes the columns. Numbers come back bit for bit. Text that is not valid Unicode (a lone
surrogate in a judge's answer) is written with backslash escapes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from exprl_megatron.judging.judgement import Abstained, Judgement, Scored
from exprl_megatron.rollout.group import GradedTrace, Group, JudgedSegment, RewardTerm
from exprl_megatron.rollout.trace import Trace

_JUDGEMENT = (
    pa.field("value", pa.float64()),
    pa.field("reason", pa.string()),
    pa.field("evidence", pa.string()),
    pa.field("hash", pa.string()),
)
_TERM = (
    pa.field("name", pa.string()),
    pa.field("source", pa.string()),
    pa.field("weight", pa.float64()),
    pa.field("value", pa.float64()),
    pa.field("evidence", pa.string()),
)
_SPAN = (pa.field("start", pa.int32()), pa.field("end", pa.int32()))
_EXPERTS = (
    pa.field("layers", pa.int16()),
    pa.field("top_k", pa.int16()),
    pa.field("id_bytes", pa.int8()),
    pa.field("ids", pa.large_binary()),
)
"""`ids` is the array [prompt and response tokens - 1, layers, top_k] row by row: uint8, or little-endian int16."""
_ID_TYPES: dict[int, np.dtype] = {1: np.dtype(np.uint8), 2: np.dtype("<i2")}

SCHEMA = pa.schema(
    [
        ("group", pa.int32()),
        ("problem_id", pa.string()),
        ("domain", pa.string()),
        ("sample", pa.int32()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("log_probs", pa.list_(pa.float32())),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("weight_versions", pa.list_(pa.struct([pa.field("version", pa.string()), *_SPAN]))),
        ("cached_tokens", pa.int32()),
        ("judgement", pa.struct(_JUDGEMENT)),
        ("segments", pa.list_(pa.struct([*_SPAN, *_JUDGEMENT]))),
        ("verified", pa.struct(_JUDGEMENT)),
        ("terms", pa.list_(pa.struct(_TERM))),
        ("routed_experts", pa.struct(_EXPERTS)),
    ]
)

TraceRow = tuple[int, Group, GradedTrace]
"""A trace, its group and the number of that in its step."""


def rows_of(groups: Sequence[Group]) -> list[TraceRow]:
    """Return all traces in the order of the groups and of the samples."""
    return [(number, group, member) for number, group in enumerate(groups) for member in group.samples]


def batch_of(rows: Sequence[TraceRow]) -> pa.RecordBatch:
    """Return the rows as a batch with the columns of SCHEMA."""
    members = [member for _, _, member in rows]
    traces = [member.trace for member in members]
    columns: dict[str, pa.Array] = {
        "group": pa.array([number for number, _, _ in rows], pa.int32()),
        "problem_id": _texts(trace.problem_id for trace in traces),
        "domain": _texts(group.domain for _, group, _ in rows),
        "sample": pa.array([trace.sample for trace in traces], pa.int32()),
        "prompt_ids": _lists([trace.prompt_ids for trace in traces]),
        "token_ids": _lists([trace.token_ids for trace in traces]),
        "log_probs": _lists([trace.log_probs for trace in traces]),
        "text": _texts(trace.text for trace in traces),
        "finish_reason": _texts(trace.finish_reason for trace in traces),
        "weight_versions": _nested([trace.weight_versions for trace in traces], _versions),
        "cached_tokens": pa.array([trace.cached_tokens for trace in traces], pa.int32()),
        "judgement": _judgements([member.judgement for member in members]),
        "segments": _nested([member.segments for member in members], _segments),
        "verified": _judgements([member.verified for member in members]),
        "terms": _nested([member.terms for member in members], _terms),
        "routed_experts": _experts([trace.routed_experts for trace in traces]),
    }
    return pa.RecordBatch.from_arrays([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def groups_of(parts: Iterable[pa.Table]) -> list[Group]:
    """Return the groups whose traces are the rows of `parts`, in their order; ValueError for numbers that none can
    have.

    A group may continue in the next part. What is read of a part is dropped when the next one is taken, so that small
    parts need little memory in addition to the groups.
    """
    members: dict[int, list[GradedTrace]] = {}
    named: dict[int, tuple[str, str]] = {}
    for part in parts:
        for row, member in _members(part):
            named.setdefault(row["group"], (row["problem_id"], row["domain"]))
            members.setdefault(row["group"], []).append(member)
    return [Group(problem_id, tuple(members[number]), domain) for number, (problem_id, domain) in named.items()]


def _members(table: pa.Table) -> Iterator[tuple[dict[str, Any], GradedTrace]]:
    """Yield each row without its arrays, and the graded trace that it holds."""
    arrays = {name: _slices(table[name]) for name in ("prompt_ids", "token_ids", "log_probs")}
    if not all(np.isfinite(log_probs).all() for log_probs in arrays["log_probs"]):
        raise ValueError("log_probs has a number that is not finite")
    experts = _read_experts(table)
    others = table.select([name for name in table.column_names if name not in (*arrays, "routed_experts")])
    for index, row in enumerate(others.to_pylist()):
        own: dict[str, Any] = {name: slices[index] for name, slices in arrays.items()}
        yield row, _member(row, own | {"routed_experts": experts[index]})


def _lists(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    offsets = np.fromiter(accumulate(map(len, arrays), initial=0), np.int32, len(arrays) + 1)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))


def _slices(column: pa.ChunkedArray) -> list[np.ndarray]:
    """Return the column's lists, all in one piece of memory."""
    lists = column.combine_chunks()
    # By to_numpy pyarrow imports pandas, which takes half a second.
    offsets, values = np.from_dlpack(lists.offsets).tolist(), np.from_dlpack(lists.values)
    return [values[start:end] for start, end in pairwise(offsets)]


def _experts(arrays: Sequence[np.ndarray | None]) -> pa.StructArray:
    known = [array for array in arrays if array is not None]
    if not known:
        return pa.nulls(len(arrays), pa.struct(_EXPERTS))
    # Neither a shape nor ids where there are none.
    layers, top_k, id_bytes = (
        [0 if array is None else size(array) for array in arrays]
        for size in (lambda a: a.shape[1], lambda a: a.shape[2], lambda a: a.itemsize)
    )
    ids = [b"" if array is None else array.astype(_ID_TYPES[array.itemsize], copy=False).tobytes() for array in arrays]
    columns = [
        pa.array(column, field.type) for column, field in zip((layers, top_k, id_bytes, ids), _EXPERTS, strict=True)
    ]
    return pa.StructArray.from_arrays(columns, fields=list(_EXPERTS), mask=pa.array([a is None for a in arrays]))


def _read_experts(table: pa.Table) -> list[np.ndarray | None]:
    """Return the experts of each row; None where it has none, as in a file of version 2."""
    if "routed_experts" not in table.column_names:
        return [None] * len(table)
    return [_ids_of(cell) for cell in table["routed_experts"]]


def _ids_of(cell: pa.StructScalar) -> np.ndarray | None:
    if not cell.is_valid:
        return None
    layers, top_k, id_bytes = (cell[name].as_py() for name in ("layers", "top_k", "id_bytes"))
    return np.frombuffer(cell["ids"].as_buffer(), _ID_TYPES[id_bytes]).reshape(-1, layers, top_k)


def _texts(texts: Iterable[str | None]) -> pa.Array:
    return pa.array([None if text is None else text.encode("utf-8", "backslashreplace") for text in texts], pa.string())


def _nested(lists: Sequence[Sequence], structs: Callable[[list], pa.StructArray]) -> pa.ListArray:
    offsets = list(accumulate(map(len, lists), initial=0))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), structs([item for items in lists for item in items]))


def _versions(spans: list[tuple[str, int, int]]) -> pa.StructArray:
    columns = [
        _texts(version for version, _, _ in spans),
        pa.array([start for _, start, _ in spans], pa.int32()),
        pa.array([end for _, _, end in spans], pa.int32()),
    ]
    return pa.StructArray.from_arrays(columns, fields=list(SCHEMA.field("weight_versions").type.value_type))


def _segments(segments: list[JudgedSegment]) -> pa.StructArray:
    columns = [
        pa.array([segment.start for segment in segments], pa.int32()),
        pa.array([segment.end for segment in segments], pa.int32()),
        *_judgement_columns([segment.judgement for segment in segments]),
    ]
    return pa.StructArray.from_arrays(columns, fields=[*_SPAN, *_JUDGEMENT])


def _terms(terms: list[RewardTerm]) -> pa.StructArray:
    columns = [
        _texts(term.name for term in terms),
        _texts(term.source for term in terms),
        pa.array([term.weight for term in terms], pa.float64()),
        pa.array([term.value for term in terms], pa.float64()),
        _texts(term.evidence for term in terms),
    ]
    return pa.StructArray.from_arrays(columns, fields=list(_TERM))


def _judgements(judgements: list[Judgement | None]) -> pa.StructArray:
    missing = pa.array([judgement is None for judgement in judgements])
    return pa.StructArray.from_arrays(_judgement_columns(judgements), fields=list(_JUDGEMENT), mask=missing)


def _judgement_columns(judgements: Sequence[Judgement | None]) -> list[pa.Array]:
    return [
        pa.array([one.value if isinstance(one, Scored) else None for one in judgements], pa.float64()),
        _texts(one.reason if isinstance(one, Abstained) else None for one in judgements),
        _texts(None if one is None else one.evidence for one in judgements),
        _texts(None if one is None else one.hash for one in judgements),
    ]


def _member(row: dict[str, Any], arrays: dict[str, Any]) -> GradedTrace:
    trace = Trace(
        problem_id=row["problem_id"],
        sample=row["sample"],
        text=row["text"],
        finish_reason=row["finish_reason"],
        weight_versions=tuple((span["version"], span["start"], span["end"]) for span in row["weight_versions"]),
        cached_tokens=row["cached_tokens"],
        **arrays,
    )
    segments = (JudgedSegment(item["start"], item["end"], _judgement(item)) for item in row["segments"])
    verified = None if row["verified"] is None else _judgement(row["verified"])
    # Logs of earlier versions have no terms.
    terms = tuple(RewardTerm(**term) for term in row.get("terms") or ())
    return GradedTrace(trace, _judgement(row["judgement"]), tuple(segments), verified, terms)


def _judgement(record: dict[str, Any]) -> Judgement:
    if record["reason"] is None:
        return Scored(record["value"], record["evidence"], record["hash"])
    return Abstained(record["reason"], record["evidence"], record["hash"])
