"""Deliveries on their way, at either end: two rounds at a time, and the memory that these take in turn."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist

from exprl_megatron.serving.delivery_tables import Delivery

_AT_ONCE = 2


class Lanes:
    """Memory of `dtype` on `device` beside the weights; each round that is in flight has a lane of its own."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self._memory = [torch.empty(0, dtype=dtype, device=device) for _ in range(_AT_ONCE)]

    def take(
        self, lane: int, deliveries: Sequence[Sequence[torch.Tensor]]
    ) -> tuple[list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
        """For each delivery, given as its parts in parameters, the one piece of memory that is sent or received.

        That is its only part's own where this is contiguous and of `dtype`; else memory of the lane, in place of what
        was last taken of it. Beside that each part that is to be copied, with its place in the lane's memory.
        """
        beside = [parts for parts in deliveries if not self._is_one_piece(parts)]
        total = sum(part.numel() for parts in beside for part in parts)
        if self._memory[lane].numel() < total:
            self._memory[lane] = self._memory[lane].new_empty(total)
        pieces, copies, start = [], [], 0
        for parts in deliveries:
            if self._is_one_piece(parts):
                pieces.append(parts[0])
                continue
            counts = [part.numel() for part in parts]
            pieces.append(self._memory[lane].narrow(0, start, sum(counts)))
            places = pieces[-1].split(counts)
            copies += [(part, place.view(part.shape)) for part, place in zip(parts, places, strict=True)]
            start += sum(counts)
        return pieces, copies

    def _is_one_piece(self, parts: Sequence[torch.Tensor]) -> bool:
        return len(parts) == 1 and parts[0].is_contiguous() and parts[0].dtype == self._memory[0].dtype


def in_rounds(
    rounds: Iterable[list[Delivery]],
    begin: Callable[[int, list[Delivery]], list[dist.P2POp]],
    end: Callable[[int], None] = lambda lane: None,
) -> None:
    """Sends or receives the deliveries of each of the `rounds`.

    `begin` gives the operations of one round in a lane; `end` is called when they are done, before the lane is taken
    again.
    """
    under_way: deque[tuple[int, list[dist.Work]]] = deque()

    def finish() -> None:
        lane, works = under_way.popleft()
        for work in works:
            work.wait()
        end(lane)

    for number, together in enumerate(rounds):
        if len(under_way) == _AT_ONCE:
            finish()
        lane = number % _AT_ONCE
        under_way.append((lane, dist.batch_isend_irecv(begin(lane, together))))
    while under_way:
        finish()
