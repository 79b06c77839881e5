"""Assigns sequences to data-parallel ranks and micro-batches, and lays them out within a micro-batch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heapify, heappop, heappush, heapreplace

from exprl_megatron.config.policy import PolicyConfig

MicroBatchPlan = list[list[list[int]]]
"""Indices of sequences as [data-parallel rank][micro-batch][row]; an empty micro-batch is a dummy."""

_COUNT_RESOLUTION = 512
"""The number of micro-batches is searched to one part in this many, so that the search does not grow with it."""


@dataclass(frozen=True)
class PackingShape:
    """How the sequences of a micro-batch are laid out for the model.

    Packed, they are concatenated to one row, each padded to a multiple of `sequence`, and the row (behind
    its last sequence) to a multiple of `row`. Else each has a row, padded to the longest and to a multiple of `row`.
    """

    packed: bool
    sequence: int = 1
    row: int = 1
    """A multiple of `sequence`."""
    cp: int = 1
    """Context-parallel ranks that share each sequence."""

    def with_padding(self, lengths: Sequence[int]) -> list[int]:
        """Return the tokens that each sequence of a micro-batch takes."""
        if not self.packed:
            return [padded(max(lengths), self.row)] * len(lengths)
        sizes = [padded(length, self.sequence) for length in lengths]
        sizes[-1] += padded(sum(sizes), self.row) - sum(sizes)
        return sizes


def shape_of(config: PolicyConfig, cuda: bool, packed: bool | None = None) -> PackingShape:
    """Return the shape of a config's micro-batches; `packed` replaces `policy.packing`. Lengths are rounded up since:

    * Context parallelism cuts each sequence into 2 x cp chunks.
    * Sequence parallelism cuts a rank's part of a row over tp ranks.
    * FP8 products need a multiple of 128 tokens (blocks of 128 x 128, and of each sequence-parallel rank's part).
    * CUDA kernels are faster where a rank's part is a multiple of 64.
    """
    layout = config.layout
    sequence = 2 * layout.cp if layout.cp > 1 else 1
    tp = layout.tp if layout.sequence_parallel else 1
    part = math.lcm(tp * (128 if config.precision.fp8 else 1), 64 if cuda else 1)
    packed = config.packing if packed is None else packed
    return PackingShape(packed, sequence, row=math.lcm(sequence, layout.cp * part), cp=layout.cp)


def plan_micro_batches(
    lengths: Sequence[int],
    ranks: int,
    budget: int,
    shape: PackingShape,
    group: int = 1,
    work: Sequence[float] | None = None,
) -> MicroBatchPlan:
    """Spread sequences over ranks so that these get like work, and there over micro-batches.

    A micro-batch holds at most `budget` tokens with its padding (a single longer sequence makes a micro-batch of
    its own). All ranks get the same number of micro-batches, a multiple of `group`. `work` is that of each sequence, in
    any unit; None: its tokens.
    """
    work = lengths if work is None else work
    order = sorted(range(len(lengths)), key=lambda index: (-work[index], index))
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for index in order:
        load, rank = loads[0]
        dealt[rank].append(index)
        heapreplace(loads, (load + work[index], rank))
    fill = partial(_fill_packed, work=work) if shape.packed else _fill_padded
    return _evenly(dealt, partial(fill, lengths=lengths, budget=budget, shape=shape), group)


def padding_share(lengths: Sequence[int], plan: MicroBatchPlan, shape: PackingShape) -> float:
    """Return the share of the tokens that the model computes under `plan` that are padding; a dummy micro-batch has one
    token and padding.
    """
    rows = [[lengths[index] for index in rows] or [1] for micros in plan for rows in micros]
    return 1 - sum(lengths) / sum(sum(shape.with_padding(row)) for row in rows)


def padded(length: int, multiple: int) -> int:
    """Return `length` rounded up to `multiple`."""
    return math.ceil(length / multiple) * multiple


def _evenly(dealt: list[list[int]], fill, group: int) -> MicroBatchPlan:
    """Return each rank's indices in equally many micro-batches; fill(own, count) makes at least `count` of them."""
    count = 1
    while True:
        filled = [fill(own, count) for own in dealt]
        needed = padded(max(map(len, filled)), group)
        if needed == count:
            return filled
        count = needed


def _fill_packed(
    own: list[int], count: int, *, work: Sequence[float], lengths: Sequence[int], budget: int, shape: PackingShape
) -> list[list[int]]:
    """Fill `count` micro-batches of equal work, or as many more as the budget needs; `own` is in order of work."""
    sizes = {index: padded(lengths[index], shape.sequence) for index in own}
    capacity = budget // shape.row * shape.row
    count = max(count, math.ceil(sum(min(size, budget) for size in sizes.values()) / budget))
    return _fewest(count, lambda micros: _balance(own, micros, work, sizes, capacity))


def _fewest(least: int, fill: Callable[[int], list[list[int]] | None]) -> list[list[int]]:
    """Return the result of `fill` for the smallest count, from `least` on, for which it is not None.

    Found in steps that double, then by bisection, as if every larger count would do as well.
    """
    resolution = max(1, least // _COUNT_RESOLUTION)
    failed, step, count = least - 1, resolution, least
    while (found := fill(count)) is None:
        failed, count, step = count, count + step, 2 * step
    while count - failed > resolution:
        middle = (failed + count) // 2
        filled = fill(middle)
        if filled is None:
            failed = middle
        else:
            count, found = middle, filled
    return found


def _balance(
    own: list[int], count: int, work: Sequence[float], sizes: dict[int, int], capacity: int
) -> list[list[int]] | None:
    """Assign each index in turn to the micro-batch with the least work that has room; None where none has room.

    As sizes fall, a micro-batch without room for an index may have some for a later one: it waits in `full`, those
    with the fewest tokens first, and each index that is placed moves at most one micro-batch there.
    """
    # Nothing has less work than an empty micro-batch.
    micros = [[index] for index in own[:count]] + [[] for _ in range(count - len(own))]
    tokens = [sizes[index] for index in own[:count]]
    open_ = [(work[index], micro) for micro, index in enumerate(own[:count])]
    heapify(open_)
    full: list[tuple[int, float, int]] = []
    for index in own[count:]:
        room = capacity - sizes[index]
        while full and full[0][0] <= room:
            _, load, micro = heappop(full)
            heappush(open_, (load, micro))
        while open_ and tokens[open_[0][1]] > room:
            load, micro = heappop(open_)
            heappush(full, (tokens[micro], load, micro))
        if not open_:
            return None
        load, micro = open_[0]
        micros[micro].append(index)
        tokens[micro] += sizes[index]
        heapreplace(open_, (load + work[index], micro))
    return micros


def _fill_padded(
    own: list[int], count: int, *, lengths: Sequence[int], budget: int, shape: PackingShape
) -> list[list[int]]:
    """Put neighbors in length together, as few micro-batches as the budget allows, and dummies up to `count`."""
    micros: list[list[int]] = []
    for index in own:
        longest = lengths[micros[-1][0]] if micros else 0
        if micros and padded(longest, shape.row) * (len(micros[-1]) + 1) <= budget:
            micros[-1].append(index)
        else:
            micros.append([index])
    return micros + [[] for _ in range(count - len(micros))]
