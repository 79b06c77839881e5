"""Deliveries on their way, at either end: two rounds at a time, and the memory that these take in turn."""

from collections import deque
from collections.abc import Callable, Iterable
from itertools import groupby

import torch
import torch.distributed as dist

from exprl_megatron.serving.loader_orders import Delivery

_AT_ONCE = 2


class Lanes:
    """Memory of `dtype` on `device` beside the weights; each round that is under way has a lane of its own."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self._memory = [torch.empty(0, dtype=dtype, device=device) for _ in range(_AT_ONCE)]

    def take(self, lane: int, counts: Iterable[int]) -> list[torch.Tensor]:
        """Vectors of so many numbers, in place of those that were last taken of the lane."""
        counts = list(counts)
        if self._memory[lane].numel() < sum(counts):
            self._memory[lane] = self._memory[lane].new_empty(sum(counts))
        return list(self._memory[lane][: sum(counts)].split(counts))


def in_rounds(
    deliveries: Iterable[Delivery],
    begin: Callable[[int, list[Delivery]], list[dist.P2POp]],
    end: Callable[[int], None] = lambda lane: None,
) -> None:
    """Sends or receives `deliveries`, which are sorted by rounds.

    `begin` gives the operations of one round in a lane; `end` is called when they are done, before the lane is taken
    again.
    """
    under_way: deque[tuple[int, list[dist.Work]]] = deque()

    def finish() -> None:
        lane, works = under_way.popleft()
        for work in works:
            work.wait()
        end(lane)

    for number, (_, together) in enumerate(groupby(deliveries, key=lambda delivery: delivery.round)):
        if len(under_way) == _AT_ONCE:
            finish()
        lane = number % _AT_ONCE
        under_way.append((lane, dist.batch_isend_irecv(begin(lane, list(together)))))
    while under_way:
        finish()
