"""How context parallelism cuts a sequence: into 2 x cp chunks, of which rank r holds the r-th and the r-th last.

Under a causal mask the first chunks are cheap and the last ones dear; such a pair costs every rank the same. Each
sequence of a packed row is cut by itself. Megatron's rotary positions and Transformer Engine expect this order.
"""

from collections.abc import Sequence

import torch


def chunk_count(cp: int) -> int:
    """Return the chunks of a sequence; its length is a multiple of this."""
    return 1 if cp == 1 else 2 * cp


def own_chunks(cp: int, rank: int) -> tuple[int, ...]:
    """Return which of a sequence's chunks `rank` holds, in this order."""
    return (0,) if cp == 1 else (rank, 2 * cp - 1 - rank)


def own_columns(lengths: Sequence[int], cp: int, rank: int) -> torch.Tensor:
    """Return the columns of a row that `rank` holds, [sum(lengths) / cp], int64; `lengths` are those of the row's
    sequences.
    """
    parts, start = [], 0
    for length in lengths:
        size = length // chunk_count(cp)
        parts += [torch.arange(size) + start + chunk * size for chunk in own_chunks(cp, rank)]
        start += length
    return torch.cat(parts)


def natural_order(lengths: Sequence[int], cp: int) -> torch.Tensor:
    """Return the position of each column of the row in the concatenation of the ranks' parts: [sum(lengths)], int64."""
    return torch.cat([own_columns(lengths, cp, rank) for rank in range(cp)]).argsort()
