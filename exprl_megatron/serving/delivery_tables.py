"""Tables of rectangles and of messages, as both ends of a direct sync keep them and send them to each other.

A large mixture of experts has a million rectangles: they are rows of numpy arrays, and become Python objects only for
the round that is in flight.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np

from exprl_megatron.serving.loader_orders import Need

RECTANGLE = np.dtype([(field, np.int32) for field in ("of", "row", "rows", "column", "columns")])
"""`of`: number of the tensor, parameter or need that it is a part of."""
MESSAGE = np.dtype([(field, np.int32) for field in ("round", "peer", "parts")])
"""`peer`: rank of the other end; `parts`: number of rectangles."""

_REMEDY = "run trainer and servers with the same version of exprl"


class Part(NamedTuple):
    """A rectangle, as in RECTANGLE."""

    of: int
    row: int
    rows: int
    column: int
    columns: int


class Delivery(NamedTuple):
    """One message between a trainer's rank and a server's: its parts, row by row, contiguous."""

    peer: int
    """Rank of the other end, in the group of all trainer and server ranks."""
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Deliveries:
    """What one rank sends, or what it receives, in the order in which it takes part."""

    messages: np.ndarray
    """MESSAGE [messages], sorted by round."""
    parts: np.ndarray
    """RECTANGLE [parts]: of the sender's parameters or of the receiver's needs, message by message."""

    def rounds(self) -> Iterator[list[Delivery]]:
        """The messages of each round that has any."""
        ends = np.cumsum(self.messages["parts"])
        cuts = np.flatnonzero(np.diff(self.messages["round"])) + 1
        for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), len(self.messages)], strict=True):
            start = int(ends[first - 1]) if first else 0
            made = []
            for _, peer, count in self.messages[first:last].tolist():
                parts = self.parts[start : start + count].tolist()
                made.append(Delivery(peer, tuple(Part(*part) for part in parts)))
                start += count
            if made:
                yield made

    def counts(self) -> np.ndarray:
        """Numbers in each message, int64."""
        ends = np.append(0, np.cumsum(areas(self.parts)))
        after = np.cumsum(self.messages["parts"])
        return ends[after] - ends[after - self.messages["parts"]]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rows of int32; of each column the differences from row to row, which repeat, compressed."""

    rows: int
    columns: dict[str, bytes]


class _Deliveries(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    messages: _Table
    parts: _Table


def areas(rectangles: np.ndarray) -> np.ndarray:
    """Numbers in each rectangle, int64."""
    return rectangles["rows"].astype(np.int64) * rectangles["columns"]


def needs_table(needs: Sequence[Need], tensors: Sequence[str]) -> np.ndarray:
    """`needs` as RECTANGLE, by the place of their tensor in `tensors`. Raises ValueError for a tensor without one."""
    places = {name: place for place, name in enumerate(tensors)}
    unknown = next((need.name for need in needs if need.name not in places), None)
    if unknown is not None:
        raise ValueError(f"the trainer does not have {unknown}, which a server needs")
    return np.array([(places[need.name], *need[1:]) for need in needs], dtype=RECTANGLE)


def pack_needs(needs: np.ndarray) -> bytes:
    """What a server's rank reports to the trainer."""
    return msgspec.msgpack.encode(_packed(needs))


def unpack_needs(packed: bytes, shapes: Mapping[str, tuple[int, ...]]) -> np.ndarray:
    """The inverse of pack_needs, checked against the tensors' `shapes`. Raises ValueError where it does not fit."""
    needs = _unpacked(_decoded(packed, _Table), RECTANGLE)
    _check_within(needs, np.array([(*shape, 1)[:2] for shape in shapes.values()]))
    return needs


def pack_deliveries(deliveries: Deliveries) -> bytes:
    """What the trainer sends to a server's rank."""
    return msgspec.msgpack.encode(_Deliveries(_packed(deliveries.messages), _packed(deliveries.parts)))


def unpack_deliveries(packed: bytes, needs: np.ndarray) -> Deliveries:
    """The inverse of pack_deliveries, checked against what the rank needs. Raises ValueError where it does not fit."""
    read = _decoded(packed, _Deliveries)
    made = Deliveries(_unpacked(read.messages, MESSAGE), _unpacked(read.parts, RECTANGLE))
    rounds, counts = made.messages["round"], made.messages["parts"]
    if (np.diff(rounds) < 0).any() or (counts < 1).any() or counts.sum(dtype=np.int64) != len(made.parts):
        raise ValueError(f"the messages of a sync do not fit their parts; {_REMEDY}")
    _check_within(made.parts, np.stack([needs["rows"], needs["columns"]], axis=1))
    return made


def _check_within(rectangles: np.ndarray, shapes: np.ndarray) -> None:
    """`shapes`: [things, 2]."""
    of = rectangles["of"]
    known = (of >= 0) & (of < len(shapes))
    fits = known.copy()
    for dim, (start, size) in enumerate((("row", "rows"), ("column", "columns"))):
        # In 64 bits, where sums do not overflow.
        first, count = rectangles[start].astype(np.int64), rectangles[size].astype(np.int64)
        fits[known] &= ((first >= 0) & (count > 0))[known] & ((first + count)[known] <= shapes[of[known], dim])
    if not fits.all():
        wrong = Part(*rectangles[int(np.argmin(fits))].tolist())
        raise ValueError(f"{wrong} is outside what it is a part of; {_REMEDY}")


def _packed(table: np.ndarray) -> _Table:
    columns = {}
    for field in table.dtype.names:
        differences = np.diff(table[field], prepend=np.int32(0))
        columns[field] = zlib.compress(differences.astype("<i4").tobytes(), 1)
    return _Table(len(table), columns)


def _unpacked(packed: _Table, dtype: np.dtype) -> np.ndarray:
    if set(packed.columns) != set(dtype.names) or packed.rows < 0:
        raise ValueError(f"expected columns {', '.join(dtype.names)}; {_REMEDY}")
    table = np.empty(packed.rows, dtype=dtype)
    for field in dtype.names:
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
