"""Which sequences go to which data-parallel rank, and there into which micro-batch."""

import math
from collections.abc import Sequence as ListLike


def pack(lengths: ListLike[int], ranks: int, budget: int, multiple: int = 1, group: int = 1) -> list[list[list[int]]]:
    """Indices into `lengths`, as [rank][micro-batch][row]; an empty micro-batch is filler.

    A micro-batch holds at most `budget` tokens after padding to its longest sequence, itself rounded up to
    `multiple` (a single longer sequence makes a micro-batch of its own). Sequences are dealt to the ranks
    from the longest down, back and forth, so that ranks get like work and micro-batches like lengths. All
    ranks get the same number of micro-batches, a multiple of `group`.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for place, index in enumerate(order):
        turn, rank = divmod(place, ranks)
        dealt[rank if turn % 2 == 0 else ranks - 1 - rank].append(index)
    packed = [_fill(own, lengths, budget, multiple) for own in dealt]
    count = math.ceil(max(map(len, packed)) / group) * group
    return [own + [[] for _ in range(count - len(own))] for own in packed]


def padded(length: int, multiple: int) -> int:
    """`length` rounded up to `multiple`."""
    return math.ceil(length / multiple) * multiple


def _fill(indices: list[int], lengths: ListLike[int], budget: int, multiple: int) -> list[list[int]]:
    """`indices`, longest first, cut into micro-batches."""
    micros: list[list[int]] = []
    for index in indices:
        if micros and (len(micros[-1]) + 1) * padded(lengths[micros[-1][0]], multiple) <= budget:
            micros[-1].append(index)
        else:
            micros.append([index])
    return micros
