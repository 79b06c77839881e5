"""Schedule of a direct (point-to-point) sync: which trainer rank sends which tensor slices to which server rank.

Pure arithmetic, as in messages.py: the intersection of the trainer ranks' shards with the slices that the servers'
ranks need. Each rank computes its own messages only. Rank numbers are those of one group: the trainer's ranks first,
then each server's.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from exprl_megatron.config.policy import Layout
from exprl_megatron.models.shards import ITEMSIZE
from exprl_megatron.serving.transfer_tables import MESSAGE, RECTANGLE, RankTransfers, areas, column_names
from exprl_megatron.weight_sync.shard_table import ShardTable

_SMALL_BYTES = 2**16
"""Slices smaller than this share a message."""


@dataclass(frozen=True)
class ShardSources:
    """Sources of the slices that one server rank needs, grouped by the trainer ranks that hold them."""

    holdings: tuple[range, ...]
    """For each group, the ranks that hold all of it."""
    ends: np.ndarray
    """int64 [groups]: the table row after the group's last one."""
    at_target: np.ndarray
    """RECTANGLE [rows], as parts of the server rank's required slices."""
    at_source: np.ndarray
    """RECTANGLE [rows], as parts of the trainer's parameters."""

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64 [groups]: elements of each group."""
        return np.diff(np.append(0, np.cumsum(areas(self.at_target)))[self.ends], prepend=0)

    def rows(self, group: int) -> slice:
        """Return the table rows of a group."""
        return slice(int(self.ends[group - 1]) if group else 0, int(self.ends[group]))


@dataclass(frozen=True)
class Volumes:
    """Bytes that a sync moves, by rank of trainer and servers."""

    sent: dict[int, int]
    """Bytes that each trainer rank sends, without the ranks that send nothing."""
    received: dict[int, int]
    """Bytes that each server rank receives."""
    parts: dict[int, int]
    """Rectangles that each server rank receives."""


class TransferPlan:
    """Assigns each required slice to a sender: of several holders, the i-th one sends to server i.

    No rank has more than `bucket_bytes` in flight in a round; its links share them (more where a single slice exceeds a
    link's share). `needs`: RECTANGLE tables of `held`'s tensors, for each server and each of its ranks; ranks with
    equal needs share one object. Raises ValueError where no rank holds a required slice.
    """

    def __init__(
        self, needs: Sequence[Sequence[np.ndarray]], held: ShardTable, layout: Layout, dtype: str, bucket_bytes: int
    ):
        self.held = held
        self._itemsize = ITEMSIZE[dtype]
        distinct = {id(rank): rank for server in needs for rank in server}
        sources = {key: shard_sources(rank, held) for key, rank in distinct.items()}
        self._targets: dict[int, tuple[int, ShardSources]] = {}
        """For each server rank, its server and the sources of its slices."""
        for server, ranks in enumerate(needs):
            for rank in ranks:
                self._targets[layout.world_size + len(self._targets)] = (server, sources[id(rank)])
        links = {(source, target) for target in self._targets for source in self._senders(target)}
        busiest = max(max(Counter(ends).values()) for ends in zip(*links, strict=True))
        self._budget = bucket_bytes // busiest
        self.nbytes = self._itemsize * sum(int(areas(rank).sum()) for server in needs for rank in server)
        """Bytes to all servers."""

    @property
    def targets(self) -> range:
        """The servers' ranks in the group."""
        return range(min(self._targets), max(self._targets) + 1)

    def volumes(self) -> Volumes:
        """Compute how much each rank sends and receives, without making its messages."""
        sent: Counter[int] = Counter()
        received, parts = {}, {}
        for target, (_, sources) in self._targets.items():
            sizes = sources.sizes * self._itemsize
            received[target], parts[target] = int(sizes.sum()), len(sources.at_target)
            for sender, size in zip(self._senders(target), sizes.tolist(), strict=True):
                sent[sender] += size
        return Volumes(dict(sent), received, parts)

    def sends(self, rank: int) -> RankTransfers:
        """Return all that the trainer's `rank` sends; parts refer to its parameters, by their numbers in ShardTable."""
        links = []
        for target, (_, sources) in self._targets.items():
            own = [group for group, sender in enumerate(self._senders(target)) if sender == rank]
            if own:
                links.append((target, [sources.at_source[sources.rows(group)] for group in own]))
        return self._cut(links)

    def receives(self, target: int) -> RankTransfers:
        """Return all that the server rank `target` receives; parts refer to its required slices, by their indices."""
        sources = self._targets[target][1]
        links: dict[int, list[np.ndarray]] = {}
        for group, sender in enumerate(self._senders(target)):
            links.setdefault(sender, []).append(sources.at_target[sources.rows(group)])
        return self._cut(links.items())

    def _senders(self, target: int) -> list[int]:
        """Return the sender of each group."""
        server, sources = self._targets[target]
        return [holding[server % len(holding)] for holding in sources.holdings]

    def _cut(self, links: Iterable[tuple[int, list[np.ndarray]]]) -> RankTransfers:
        """Cut one rank's slices into messages: per link and round, one for each large slice and one for all small ones.

        `links`: the rank of the other end, and the slices in order; both ends cut them identically.
        """
        peers, parts, lengths = [], [], []
        for peer, tables in links:
            peers.append(peer)
            parts += tables
            lengths.append(sum(map(len, tables)))
        if not parts:
            return RankTransfers(np.empty(0, MESSAGE), np.empty(0, RECTANGLE))
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
        return RankTransfers(messages, together[order])


def shard_sources(needs: np.ndarray, held: ShardTable) -> ShardSources:
    """Find the sources of the slices that one rank needs: `needs`, a RECTANGLE table [slices].

    Raises:
        ValueError: no rank holds one of them.
    """
    starts = held.starts[needs["of"]]
    counts = held.starts[needs["of"] + 1] - starts
    number = np.repeat(np.arange(len(needs), dtype=np.int32), counts)
    place = np.arange(len(number)) + np.repeat(starts - np.cumsum(counts) + counts, counts)
    need, shard = needs[number], held.shards[place]
    row, rows = _overlap(need, shard, "row", "rows")
    column, columns = _overlap(need, shard, "column", "columns")
    kept = (rows > 0) & (columns > 0)
    covered = np.zeros(len(needs), dtype=np.int64)
    np.add.at(covered, number[kept], (rows.astype(np.int64) * columns)[kept])
    if (covered != areas(needs)).any():
        missing = held.tensors[needs["of"][np.argmax(covered != areas(needs))]]
        raise ValueError(f"the trainer does not hold all of {missing} that a server needs")
    wanted = _rectangles(number, row - need["row"], rows, column - need["column"], columns)[kept]
    local = shard["local_row"] + row - shard["row"]
    sources = _rectangles(shard["parameter"], local, rows, column - shard["column"], columns)[kept]
    holding = shard["holding"][kept]
    found, firsts, which = np.unique(holding, return_index=True, return_inverse=True)
    # Holdings in the order in which they are first needed.
    by_first = np.argsort(firsts)
    rank_of = np.argsort(by_first)[which]
    order = np.argsort(rank_of, kind="stable")
    ends = np.cumsum(np.bincount(rank_of, minlength=len(found)))
    return ShardSources(tuple(held.holdings[i] for i in found[by_first]), ends, wanted[order], sources[order])


def _overlap(need: np.ndarray, shard: np.ndarray, start: str, size: str) -> tuple[np.ndarray, np.ndarray]:
    """Start and size of the overlap of two intervals in one dimension."""
    first = np.maximum(need[start], shard[start])
    return first, np.minimum(need[start] + need[size], shard[start] + shard[size]) - first


def _rectangles(*columns: np.ndarray) -> np.ndarray:
    made = np.empty(len(columns[0]), dtype=RECTANGLE)
    for field, column in zip(column_names(RECTANGLE), columns, strict=True):
        made[field] = column
    return made


def _rounds(sizes: np.ndarray, ends: np.ndarray, budget: int) -> np.ndarray:
    """Return the round of each slice: on each link, a new round starts where a slice would not fit into `budget` bytes.

    `sizes`: bytes of the slices, link by link; `ends`: where each link's slices end.
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
