"""Tables of slices and messages that trainer and servers exchange for a direct sync.

A large mixture of experts has a million slices: they are rows of numpy arrays, and become Python objects only for the
round that is in flight.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np

from exprl_megatron.serving.loader_commands import RequiredSlice

RECTANGLE = np.dtype([(field, np.int32) for field in ("of", "row", "rows", "column", "columns")])
"""A rectangle; `of` is the number of the tensor, parameter or required slice that it is a part of."""
MESSAGE = np.dtype([(field, np.int32) for field in ("round", "peer", "parts")])
"""A message; `peer` is the rank of the other end, `parts` the number of its rectangles."""

_REMEDY = "run trainer and servers with the same version of exprl"


class Slice(NamedTuple):
    """A rectangle, as in RECTANGLE."""

    of: int
    row: int
    rows: int
    column: int
    columns: int


class Transfer(NamedTuple):
    """One message between a trainer's rank and a server's: its slices, contiguous, row by row."""

    peer: int
    """Rank of the other end, in the group of all trainer and server ranks."""
    parts: tuple[Slice, ...]


@dataclass(frozen=True)
class RankTransfers:
    """All messages that one rank sends, or that it receives, in order."""

    messages: np.ndarray
    """MESSAGE [messages], sorted by round."""
    parts: np.ndarray
    """RECTANGLE [parts]: of the sender's parameters or of the receiver's required slices, message by message."""

    def rounds(self) -> Iterator[list[Transfer]]:
        """Yield the messages of each round that has any."""
        ends = np.cumsum(self.messages["parts"])
        cuts = np.flatnonzero(np.diff(self.messages["round"])) + 1
        for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), len(self.messages)], strict=True):
            start = int(ends[first - 1]) if first else 0
            made = []
            for _, peer, count in self.messages[first:last].tolist():
                parts = self.parts[start : start + count].tolist()
                made.append(Transfer(peer, tuple(Slice(*part) for part in parts)))
                start += count
            if made:
                yield made

    def counts(self) -> np.ndarray:
        """Return the elements of each message, int64 [messages]."""
        ends = np.append(0, np.cumsum(areas(self.parts)))
        after = np.cumsum(self.messages["parts"])
        return ends[after] - ends[after - self.messages["parts"]]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of int32: for each column its differences from row to row, which repeat, compressed by zlib."""

    rows: int
    columns: dict[str, bytes]


class _RankTransfers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    messages: _Table
    parts: _Table


def column_names(dtype: np.dtype) -> tuple[str, ...]:
    """Return the names of a table's columns; () for a dtype without fields."""
    return dtype.names or ()


def areas(rectangles: np.ndarray) -> np.ndarray:
    """Return the elements of each rectangle, int64 [rectangles]."""
    return rectangles["rows"].astype(np.int64) * rectangles["columns"]


def needs_table(needs: Sequence[RequiredSlice], tensors: Sequence[str]) -> np.ndarray:
    """Convert `needs` to a RECTANGLE table [needs], with indices in `tensors`.

    Raises:
        ValueError: a tensor is unknown.
    """
    places = {name: place for place, name in enumerate(tensors)}
    unknown = next((need.name for need in needs if need.name not in places), None)
    if unknown is not None:
        raise ValueError(f"the trainer does not have {unknown}, which a server needs")
    return np.array([(places[need.name], *need[1:]) for need in needs], dtype=RECTANGLE)


def pack_needs(needs: np.ndarray) -> bytes:
    """Encode the slices that a server's rank needs, a RECTANGLE table [needs], for the trainer."""
    return msgspec.msgpack.encode(_packed(needs))


def unpack_needs(packed: bytes, shapes: Mapping[str, tuple[int, ...]]) -> np.ndarray:
    """Return the inverse of pack_needs, checked against the tensors' `shapes`. Raises ValueError where it does
    not fit.
    """
    needs = _unpacked(_decoded(packed, _Table), RECTANGLE)
    _check_within(needs, np.array([(shape[0], math.prod(shape[1:])) for shape in shapes.values()]))
    return needs


def pack_transfers(transfers: RankTransfers) -> bytes:
    """Encode the transfers to a server's rank."""
    return msgspec.msgpack.encode(_RankTransfers(_packed(transfers.messages), _packed(transfers.parts)))


def unpack_transfers(packed: bytes, needs: np.ndarray) -> RankTransfers:
    """Decode what pack_transfers encoded and check it against the rank's `needs`, a RECTANGLE table [needs].

    Raises:
        ValueError: the bytes are damaged or do not fit the needs.
    """
    read = _decoded(packed, _RankTransfers)
    made = RankTransfers(_unpacked(read.messages, MESSAGE), _unpacked(read.parts, RECTANGLE))
    rounds, counts = made.messages["round"], made.messages["parts"]
    if (np.diff(rounds) < 0).any() or (counts < 1).any() or counts.sum(dtype=np.int64) != len(made.parts):
        raise ValueError(f"the messages of a sync do not fit their parts; {_REMEDY}")
    _check_within(made.parts, np.stack([needs["rows"], needs["columns"]], axis=1))
    return made


def _check_within(rectangles: np.ndarray, shapes: np.ndarray) -> None:
    """Raise ValueError for a rectangle outside the thing that it is a part of; `shapes`: [things, 2]."""
    of = rectangles["of"]
    known = (of >= 0) & (of < len(shapes))
    fits = known.copy()
    for dim, (start, size) in enumerate((("row", "rows"), ("column", "columns"))):
        # In 64 bits, where sums do not overflow.
        first, count = rectangles[start].astype(np.int64), rectangles[size].astype(np.int64)
        fits[known] &= ((first >= 0) & (count > 0))[known] & ((first + count)[known] <= shapes[of[known], dim])
    if not fits.all():
        wrong = Slice(*rectangles[int(np.argmin(fits))].tolist())
        raise ValueError(f"{wrong} is outside what it is a part of; {_REMEDY}")


def _packed(table: np.ndarray) -> _Table:
    columns = {}
    for field in column_names(table.dtype):
        differences = np.diff(table[field], prepend=np.int32(0))
        columns[field] = zlib.compress(differences.astype("<i4").tobytes(), 1)
    return _Table(len(table), columns)


def _unpacked(packed: _Table, dtype: np.dtype) -> np.ndarray:
    names = column_names(dtype)
    if set(packed.columns) != set(names) or packed.rows < 0:
        raise ValueError(f"expected columns {', '.join(names)}; {_REMEDY}")
    table = np.empty(packed.rows, dtype=dtype)
    for field in names:
        try:
            raw = zlib.decompress(packed.columns[field])
        except zlib.error as error:
            raise ValueError(f"column {field} of a sync's table is damaged: {error}") from error
        if len(raw) != 4 * packed.rows:
            raise ValueError(f"column {field} of a sync's table has {len(raw)} bytes, not {4 * packed.rows}")
        table[field] = np.cumsum(np.frombuffer(raw, "<i4"), dtype=np.int32)
    return table


def _decoded[Read](packed: bytes, kind: type[Read]) -> Read:
    try:
        return msgspec.msgpack.decode(packed, type=kind)
    except msgspec.MsgspecError as error:
        raise ValueError(f"a sync's table cannot be read ({error}); {_REMEDY}") from error
