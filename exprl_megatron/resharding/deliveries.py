"""Who sends which rectangle of which tensor to whom, where weights go from shards to shards without being joined.

Pure arithmetic, as in messages.py: what trainer ranks hold, by the table of names, cut to what servers' ranks need.
Ranks are those of one group: the trainer's first, then each server's.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from exprl_megatron.config.policy import Layout
from exprl_megatron.policy.architecture import Architecture
from exprl_megatron.resharding.messages import ITEMSIZE, Shape, copies, holders, shard_shape
from exprl_megatron.resharding.names import Parameter, hf_shapes, parameters
from exprl_megatron.serving.loader_orders import Delivery, Need, Part

_SMALL_BYTES = 2**16
"""Parts below share a message."""


@dataclass(frozen=True)
class Share:
    """A rectangle of a Hugging Face tensor (a vector counts as one column) where a trainer's rank holds it."""

    rank: int
    """The first of those that hold it; `copies` says which others do."""
    parameter: Parameter
    row: int
    rows: int
    column: int
    columns: int
    local_row: int
    """Of the rectangle's first row in the rank's parameter, whose rows are as long as the rectangle's."""


Where = tuple[Parameter, int, int]
"""A parameter, and a row and a column of the rank's part of it."""


@dataclass(frozen=True)
class Sent:
    """A delivery, and where its sender has each of its parts."""

    delivery: Delivery
    sources: tuple[Where, ...]


@dataclass(frozen=True)
class _Planned:
    """A part, and where it comes from."""

    part: Part
    where: Where


def shares(architecture: Architecture, layout: Layout, grouped: bool = False) -> dict[str, list[Share]]:
    """What makes up each exported Hugging Face tensor. `grouped` is as in names.parameters."""
    shapes = hf_shapes(architecture)
    found: dict[str, list[Share]] = defaultdict(list)
    for parameter in parameters(architecture, layout, grouped):
        if parameter.exported:
            for index, rank in enumerate(holders(parameter, layout)):
                for name, share in _shares(parameter, index, rank, shapes, layout):
                    found[name].append(share)
    return dict(found)


def sent(
    needs: Sequence[Sequence[Sequence[Need]]],
    held: Mapping[str, Sequence[Share]],
    layout: Layout,
    dtype: str,
    bucket_bytes: int,
) -> list[Sent]:
    """All deliveries that bring `needs`, of each server and each of its ranks, in the order in which ranks take part.

    Of several holders the i-th sends to server i. No rank has more than `bucket_bytes` on the way in a round (more
    where one part alone has more). Raises ValueError where nobody holds a need.
    """
    links: dict[tuple[int, int], list[_Planned]] = defaultdict(list)
    target = layout.world_size
    for server, ranks in enumerate(needs):
        for rank_needs in ranks:
            for number, need in enumerate(rank_needs):
                for source, planned in _parts(number, need, held.get(need.name, ()), layout, server):
                    links[source, target].append(planned)
            target += 1
    busiest = max(max(Counter(ends).values()) for ends in zip(*links, strict=True))
    cut = [
        sent
        for (source, target), parts in links.items()
        for sent in _deliveries(source, target, parts, ITEMSIZE[dtype], bucket_bytes // busiest)
    ]
    return sorted(cut, key=lambda sent: sent.delivery.round)


def _shares(
    parameter: Parameter, index: int, rank: int, shapes: dict[str, Shape], layout: Layout
) -> Iterable[tuple[str, Share]]:
    """The rectangles of the `index`-th shard."""
    rows = shard_shape(parameter, shapes, layout)[0]
    dim = parameter.rule.split_dim
    # Rules move whole rows: where they put the rows' numbers is where rows go.
    for name, local in zip(parameter.hf_names, parameter.rule.parts(torch.arange(rows)[:, None]), strict=True):
        shape = shapes[name]
        width = shape[1] if len(shape) == 2 else 1
        columns = width // len(holders(parameter, layout)) if dim == 1 else width
        first = index * len(local) if dim == 0 else 0
        column = index * columns if dim == 1 else 0
        # The last rows of a vocabulary may be padding.
        for start, length, local_row in _runs(local[: max(0, shape[0] - first), 0].tolist()):
            yield name, Share(rank, parameter, first + start, length, column, columns, local_row)


def _runs(rows: list[int]) -> Iterable[tuple[int, int, int]]:
    """(place, length, first) of each stretch of numbers that follow one another."""
    start = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place] != rows[place - 1] + 1:
            yield start, place - start, rows[start]
            start = place


def _parts(number: int, need: Need, held: Iterable[Share], layout: Layout, server: int) -> list[tuple[int, _Planned]]:
    """What of the `number`-th need comes from which rank. Raises ValueError where that is not all of it."""
    found = []
    for share in held:
        row, end = max(need.row, share.row), min(need.row + need.rows, share.row + share.rows)
        column = max(need.column, share.column)
        column_end = min(need.column + need.columns, share.column + share.columns)
        if row < end and column < column_end:
            part = Part(number, row - need.row, end - row, column - need.column, column_end - column)
            where = (share.parameter, share.local_row + row - share.row, column - share.column)
            ranks = copies(share.parameter, share.rank, layout)
            found.append((ranks[server % len(ranks)], _Planned(part, where)))
    if sum(planned.part.count for _, planned in found) != need.rows * need.columns:
        raise ValueError(f"the trainer does not hold all of {need.name} that a server needs")
    return found


def _deliveries(source: int, target: int, parts: Iterable[_Planned], itemsize: int, budget: int) -> list[Sent]:
    """All from one rank to another: in each round one for each large part, and one for the small parts together."""
    found: list[Sent] = []
    small: dict[int, list[_Planned]] = defaultdict(list)
    number, filled = 0, 0
    for planned in parts:
        size = planned.part.count * itemsize
        if filled and filled + size > budget:
            number, filled = number + 1, 0
        filled += size
        if size < _SMALL_BYTES:
            small[number].append(planned)
        else:
            found.append(Sent(Delivery(number, source, target, (planned.part,)), (planned.where,)))
    for number, together in small.items():
        delivery = Delivery(number, source, target, tuple(planned.part for planned in together))
        found.append(Sent(delivery, tuple(planned.where for planned in together)))
    return found
