"""Who sends which rectangle of which tensor to whom, where weights go from shards to shards without being joined.

Pure arithmetic, as in messages.py: what trainer ranks hold, by the table of names, cut to what servers' ranks need.
Ranks are those of one group: the trainer's first, then each server's.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import torch

from exprl_megatron.config.policy import Layout
from exprl_megatron.policy.architecture import Architecture
from exprl_megatron.resharding.messages import ITEMSIZE, Shape, copies, holders, shard_shape
from exprl_megatron.resharding.names import Parameter, Rule, hf_shapes, parameters
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


def plan_deliveries(
    needs: Sequence[Sequence[Sequence[Need]]],
    held: Mapping[str, Sequence[Share]],
    layout: Layout,
    dtype: str,
    bucket_bytes: int,
) -> list[Sent]:
    """All deliveries that bring `needs`, of each server and each of its ranks, in the order in which ranks take part.

    Of several holders the i-th sends to server i. No rank has more than `bucket_bytes` on its way in a round, which its
    links share (more where one part has more than a link's share). Raises ValueError where nobody holds a need.
    """
    by_copies: dict[int, dict[range, list[_Planned]]] = {}
    links: dict[tuple[int, int], list[list[_Planned]]] = defaultdict(list)
    target = layout.world_size
    for server, ranks in enumerate(needs):
        for rank_needs in ranks:
            # Servers are alike: what is worked out for a rank of one holds for the others'.
            if id(rank_needs) not in by_copies:
                by_copies[id(rank_needs)] = _by_copies(rank_needs, held, layout)
            for holding, parts in by_copies[id(rank_needs)].items():
                links[holding[server % len(holding)], target].append(parts)
            target += 1
    busiest = max(max(Counter(ends).values()) for ends in zip(*links, strict=True))
    cut: dict[tuple[int, ...], list[tuple[int, tuple[Part, ...], tuple[Where, ...]]]] = {}
    found = []
    for (source, target), lists in links.items():
        alike = tuple(map(id, lists))
        if alike not in cut:
            cut[alike] = _cut(chain.from_iterable(lists), ITEMSIZE[dtype], bucket_bytes // busiest)
        found += [Sent(Delivery(number, source, target, parts), sources) for number, parts, sources in cut[alike]]
    return sorted(found, key=lambda sent: sent.delivery.round)


def _shares(
    parameter: Parameter, index: int, rank: int, shapes: dict[str, Shape], layout: Layout
) -> Iterable[tuple[str, Share]]:
    """The rectangles of the `index`-th shard."""
    rows = shard_shape(parameter, shapes, layout)[0]
    dim = parameter.rule.split_dim
    for name, (count, runs) in zip(parameter.hf_names, _runs(parameter.rule, rows), strict=True):
        shape = shapes[name]
        width = shape[1] if len(shape) == 2 else 1
        columns = width // len(holders(parameter, layout)) if dim == 1 else width
        first = index * count if dim == 0 else 0
        column = index * columns if dim == 1 else 0
        # The last rows of a vocabulary may be padding.
        for start, length, local_row in runs:
            length = min(length, shape[0] - first - start)
            if length > 0:
                yield name, Share(rank, parameter, first + start, length, column, columns, local_row)


@lru_cache(maxsize=64)
def _runs(rule: Rule, rows: int) -> tuple[tuple[int, tuple[tuple[int, int, int], ...]], ...]:
    """Of a parameter of so many rows, for each part how many rows it has, and where they are in the parameter.

    That is (row of the part, length, row of the parameter) of each stretch of rows that follow one another in both.
    """
    found = []
    # Rules move whole rows: where they put the rows' numbers is where rows go.
    for part in rule.parts(torch.arange(rows)[:, None]):
        at = part[:, 0].tolist()
        starts = [i for i in range(len(at)) if i == 0 or at[i] != at[i - 1] + 1]
        ends = [*starts[1:], len(at)]
        found.append((len(at), tuple((i, end - i, at[i]) for i, end in zip(starts, ends, strict=True))))
    return tuple(found)


def _by_copies(
    needs: Sequence[Need], held: Mapping[str, Sequence[Share]], layout: Layout
) -> dict[range, list[_Planned]]:
    """What brings the needs of one rank, by the ranks that have it, each of which has all of it."""
    found: dict[range, list[_Planned]] = defaultdict(list)
    for number, need in enumerate(needs):
        count = 0
        for share in held.get(need.name, ()):
            planned = _common(number, need, share)
            if planned is not None:
                found[copies(share.parameter, share.rank, layout)].append(planned)
                count += planned.part.count
        if count != need.rows * need.columns:
            raise ValueError(f"the trainer does not hold all of {need.name} that a server needs")
    return found


def _common(number: int, need: Need, share: Share) -> _Planned | None:
    """What of the `number`-th need the share has, if anything."""
    row, end = max(need.row, share.row), min(need.row + need.rows, share.row + share.rows)
    column = max(need.column, share.column)
    column_end = min(need.column + need.columns, share.column + share.columns)
    if row >= end or column >= column_end:
        return None
    part = Part(number, row - need.row, end - row, column - need.column, column_end - column)
    return _Planned(part, (share.parameter, share.local_row + row - share.row, column - share.column))


def _cut(
    planned: Iterable[_Planned], itemsize: int, budget: int
) -> list[tuple[int, tuple[Part, ...], tuple[Where, ...]]]:
    """The messages from one rank to another: in each round one for each large part, and one for all small parts.

    Of each its round, its parts, and where these come from.
    """
    found = []
    small: dict[int, list[_Planned]] = defaultdict(list)
    number, filled = 0, 0
    for one in planned:
        size = one.part.count * itemsize
        if filled and filled + size > budget:
            number, filled = number + 1, 0
        filled += size
        if size < _SMALL_BYTES:
            small[number].append(one)
        else:
            found.append((number, (one.part,), (one.where,)))
    for number, together in small.items():
        found.append((number, tuple(one.part for one in together), tuple(one.where for one in together)))
    return found
