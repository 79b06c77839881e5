"""Who sends which rectangle of which tensor to whom, where weights go from shards to shards without being joined.

Pure arithmetic, as in messages.py: what trainer ranks hold, cut to what servers' ranks need. A plan gives each rank its
own messages; nobody makes everybody's. Ranks are those of one group: the trainer's first, then each server's.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from exprl_megatron.config.policy import Layout
from exprl_megatron.models.shards import ITEMSIZE
from exprl_megatron.serving.delivery_tables import MESSAGE, RECTANGLE, Deliveries, areas
from exprl_megatron.weight_sync.held import Held

_SMALL_BYTES = 2**16
"""Parts below share a message."""


@dataclass(frozen=True)
class Transfers:
    """What brings the needs of one server rank: stretches of rows of which each is held by the same ranks."""

    holdings: tuple[range, ...]
    """Of each stretch the ranks that have all of it."""
    ends: np.ndarray
    """int64 [stretches]: the row after its last one."""
    wanted: np.ndarray
    """RECTANGLE [rows] of needs."""
    sources: np.ndarray
    """RECTANGLE [rows] of parameters."""

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64 [stretches]: numbers in each."""
        return np.diff(np.append(0, np.cumsum(areas(self.wanted)))[self.ends], prepend=0)

    def rows(self, stretch: int) -> slice:
        """Of a stretch."""
        return slice(int(self.ends[stretch - 1]) if stretch else 0, int(self.ends[stretch]))


@dataclass(frozen=True)
class Volumes:
    """What crosses in a sync, by rank of trainer and servers."""

    sent: dict[int, int]
    """Bytes that each trainer rank sends, those with none left out."""
    received: dict[int, int]
    """Bytes that each server rank receives."""
    parts: dict[int, int]
    """Rectangles that each server rank receives."""


class DeliveryPlan:
    """Of several holders the i-th sends to server i. No rank has more than `bucket_bytes` on its way in a round, which
    its links share (more where one part has more than a link's share).

    `needs`: RECTANGLE tables of `held`'s tensors, of each server and each of its ranks; of ranks that are alike the
    same object. Raises ValueError where no rank holds a need.
    """

    def __init__(
        self, needs: Sequence[Sequence[np.ndarray]], held: Held, layout: Layout, dtype: str, bucket_bytes: int
    ):
        self.held = held
        self._itemsize = ITEMSIZE[dtype]
        distinct = {id(rank): rank for server in needs for rank in server}
        transfers = {key: transfers_of(rank, held) for key, rank in distinct.items()}
        self._targets = {}
        """Of each server rank its server and what it is sent."""
        for server, ranks in enumerate(needs):
            for rank in ranks:
                self._targets[layout.world_size + len(self._targets)] = (server, transfers[id(rank)])
        links = {(source, target) for target in self._targets for source in self._senders(target)}
        busiest = max(max(Counter(ends).values()) for ends in zip(*links, strict=True))
        self._budget = bucket_bytes // busiest
        self.nbytes = self._itemsize * sum(int(areas(rank).sum()) for server in needs for rank in server)
        """To all servers."""

    @property
    def targets(self) -> range:
        """The servers' ranks."""
        return range(min(self._targets), max(self._targets) + 1)

    def volumes(self) -> Volumes:
        """How much each rank sends and receives, without its messages."""
        sent: Counter[int] = Counter()
        received, parts = {}, {}
        for target, (_, transfers) in self._targets.items():
            sizes = transfers.sizes * self._itemsize
            received[target], parts[target] = int(sizes.sum()), len(transfers.wanted)
            for sender, size in zip(self._senders(target), sizes.tolist(), strict=True):
                sent[sender] += size
        return Volumes(dict(sent), received, parts)

    def sends(self, rank: int) -> Deliveries:
        """What the trainer's `rank` sends; parts are of its parameters, by their numbers in Held."""
        links = []
        for target, (_, transfers) in self._targets.items():
            own = [stretch for stretch, sender in enumerate(self._senders(target)) if sender == rank]
            if own:
                links.append((target, [transfers.sources[transfers.rows(stretch)] for stretch in own]))
        return self._cut(links)

    def receives(self, target: int) -> Deliveries:
        """What the server rank `target` is sent; parts are of its needs, by their places."""
        transfers = self._targets[target][1]
        links: dict[int, list[np.ndarray]] = {}
        for stretch, sender in enumerate(self._senders(target)):
            links.setdefault(sender, []).append(transfers.wanted[transfers.rows(stretch)])
        return self._cut(links.items())

    def _senders(self, target: int) -> list[int]:
        """Who sends each stretch."""
        server, transfers = self._targets[target]
        return [holding[server % len(holding)] for holding in transfers.holdings]

    def _cut(self, links: Iterable[tuple[int, list[np.ndarray]]]) -> Deliveries:
        """One rank's messages: on each link in each round one for each large part, and one for all small parts.

        `links`: the rank of the other end, and the parts in order, which both ends cut alike.
        """
        peers, parts, lengths = [], [], []
        for peer, tables in links:
            peers.append(peer)
            parts += tables
            lengths.append(sum(map(len, tables)))
        if not parts:
            return Deliveries(np.empty(0, MESSAGE), np.empty(0, RECTANGLE))
        together = np.concatenate(parts)
        link = np.repeat(np.arange(len(peers)), lengths)
        sizes = areas(together) * self._itemsize
        rounds = _rounds(sizes, np.cumsum(lengths), self._budget)
        small = sizes < _SMALL_BYTES
        keys = (rounds * len(peers) + link) * 2 + small
        order = np.argsort(keys, kind="stable")
        keys, small = keys[order], small[order]
        begins = np.append(True, ~small[1:] | (np.diff(keys) != 0))
        firsts = np.flatnonzero(begins)
        messages = np.empty(len(firsts), dtype=MESSAGE)
        messages["round"] = rounds[order[firsts]]
        messages["peer"] = np.array(peers)[link[order[firsts]]]
        messages["parts"] = np.diff(np.append(firsts, len(order)))
        return Deliveries(messages, together[order])


def transfers_of(needs: np.ndarray, held: Held) -> Transfers:
    """What brings the needs of one rank. Raises ValueError where no rank holds one."""
    starts = held.starts[needs["of"]]
    counts = held.starts[needs["of"] + 1] - starts
    number = np.repeat(np.arange(len(needs), dtype=np.int32), counts)
    place = np.arange(len(number)) + np.repeat(starts - np.cumsum(counts) + counts, counts)
    need, share = needs[number], held.shares[place]
    row, rows = _overlap(need, share, "row", "rows")
    column, columns = _overlap(need, share, "column", "columns")
    kept = (rows > 0) & (columns > 0)
    brought = np.zeros(len(needs), dtype=np.int64)
    np.add.at(brought, number[kept], (rows.astype(np.int64) * columns)[kept])
    if (brought != areas(needs)).any():
        missing = held.tensors[needs["of"][np.argmax(brought != areas(needs))]]
        raise ValueError(f"the trainer does not hold all of {missing} that a server needs")
    wanted = _rectangles(number, row - need["row"], rows, column - need["column"], columns)[kept]
    local = share["local_row"] + row - share["row"]
    sources = _rectangles(share["parameter"], local, rows, column - share["column"], columns)[kept]
    holding = share["holding"][kept]
    found, firsts, which = np.unique(holding, return_index=True, return_inverse=True)
    # In the order in which they are first needed.
    by_first = np.argsort(firsts)
    rank_of = np.argsort(by_first)[which]
    order = np.argsort(rank_of, kind="stable")
    ends = np.cumsum(np.bincount(rank_of, minlength=len(found)))
    return Transfers(tuple(held.holdings[i] for i in found[by_first]), ends, wanted[order], sources[order])


def _overlap(need: np.ndarray, share: np.ndarray, start: str, size: str) -> tuple[np.ndarray, np.ndarray]:
    """Where what both have in one dimension begins, and how much that is."""
    first = np.maximum(need[start], share[start])
    return first, np.minimum(need[start] + need[size], share[start] + share[size]) - first


def _rectangles(*columns: np.ndarray) -> np.ndarray:
    made = np.empty(len(columns[0]), dtype=RECTANGLE)
    for field, column in zip(RECTANGLE.names, columns, strict=True):
        made[field] = column
    return made


def _rounds(sizes: np.ndarray, ends: np.ndarray, budget: int) -> np.ndarray:
    """The round of each part: on each link the next begins where a part would not fit into `budget` bytes.

    `sizes`: bytes of the parts, link by link; `ends`: where each link's parts end.
    """
    filled = np.cumsum(sizes)
    at = np.arange(len(sizes))
    following = np.maximum(np.searchsorted(filled, filled - sizes + budget, side="right"), at + 1)
    number, found = 0, np.full(len(sizes), -1)
    heads = np.append(0, ends[:-1])
    while len(heads):
        found[heads] = number
        number += 1
        heads = following[heads]
        within = heads < ends
        heads, ends = heads[within], ends[within]
    return found[np.maximum.accumulate(np.where(found >= 0, at, 0))]
