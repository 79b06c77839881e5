"""The floor of a weight sync: the same bytes, in the same pieces, through a bare broadcast between as many processes.

A stock server broadcasts nothing but weights, so processes of the same kind stand for its ranks: each receives into
one piece of memory and does nothing with it.
"""

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from exprl_megatron.weight_sync.groups import init_group, rendezvous_store

NAME = "floor"
_DEADLINE_S = 900.0


class Floor:
    """The sending side, rank 0 of `1 + receivers` processes."""

    def __init__(self, port: int, receivers: int):
        self._place = rendezvous_store("127.0.0.1", _DEADLINE_S, port)
        self._group = init_group(NAME, "127.0.0.1", port, 0, 1 + receivers, _DEADLINE_S)

    def seconds(self, sizes: Sequence[int]) -> float:
        """From the first byte until all receivers have pieces of `sizes` bytes, sent one after the other."""
        _announce(self._group, sizes)
        piece = torch.ones(max(sizes), dtype=torch.uint8)
        _wait(self._group)
        started = time.monotonic()
        for size in sizes:
            dist.broadcast(piece[:size], group=self._group, group_src=0)
        _wait(self._group)
        return time.monotonic() - started

    def close(self) -> None:
        """Let the receivers end."""
        _announce(self._group, [])
        dist.destroy_process_group(self._group)


def receive(port: int, rank: int, receivers: int) -> None:
    """A receiver's work, until the sender closes; `rank` is from 1 on."""
    group = init_group(NAME, "127.0.0.1", port, rank, 1 + receivers, _DEADLINE_S)
    while sizes := _announce(group, None):
        piece = torch.zeros(max(sizes), dtype=torch.uint8)
        _wait(group)
        for size in sizes:
            dist.broadcast(piece[:size], group=group, group_src=0)
        _wait(group)
    # A group that lives until the interpreter ends may abort the process: its threads are still running then.
    dist.destroy_process_group(group)


def _announce(group: dist.ProcessGroup, sizes: Sequence[int] | None) -> list[int]:
    """Return the sender's `sizes`, known to all."""
    count = torch.tensor([0 if sizes is None else len(sizes)])
    dist.broadcast(count, group=group, group_src=0)
    known_sizes = torch.tensor(sizes) if sizes else torch.zeros(int(count), dtype=torch.int64)
    if int(count):
        dist.broadcast(known_sizes, group=group, group_src=0)
    return known_sizes.tolist()


def _wait(group: dist.ProcessGroup) -> None:
    dist.all_reduce(torch.zeros(1), group=group)
