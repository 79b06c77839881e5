"""Double buffering of a direct sync, at either end: two rounds are in flight, each with a staging buffer."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist

from exprl_megatron.serving.transfer_tables import Transfer

_SLOTS = 2


class StagingBuffers:
    """Staging memory of `dtype` on `device`; each round that is in flight has its own slot."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self._memory = [torch.empty(0, dtype=dtype, device=device) for _ in range(_SLOTS)]

    def take(
        self, slot: int, transfers: Sequence[Sequence[torch.Tensor]]
    ) -> tuple[list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
        """Return, for each transfer, given as its parts in parameters, the contiguous memory that is sent or received.

        That is the parameter's own memory where a transfer has one part, which is contiguous and of `dtype`; otherwise
        it is memory of the slot, which overwrites the slot's previous content. The second result is each part that has
        to be copied, with its place in the slot's memory.
        """
        staged = [parts for parts in transfers if not self._is_one_piece(parts)]
        total = sum(part.numel() for parts in staged for part in parts)
        if self._memory[slot].numel() < total:
            self._memory[slot] = self._memory[slot].new_empty(total)
        pieces, copies, start = [], [], 0
        for parts in transfers:
            if self._is_one_piece(parts):
                pieces.append(parts[0])
                continue
            counts = [part.numel() for part in parts]
            pieces.append(self._memory[slot].narrow(0, start, sum(counts)))
            places = pieces[-1].split(counts)
            copies += [(part, place.view(part.shape)) for part, place in zip(parts, places, strict=True)]
            start += sum(counts)
        return pieces, copies

    def _is_one_piece(self, parts: Sequence[torch.Tensor]) -> bool:
        return len(parts) == 1 and parts[0].is_contiguous() and parts[0].dtype == self._memory[0].dtype


def run_rounds(
    rounds: Iterable[list[Transfer]],
    begin: Callable[[int, list[Transfer]], list[dist.P2POp]],
    end: Callable[[int], None] = lambda slot: None,
) -> None:
    """Send or receive the transfers of each of the `rounds`.

    `begin` returns the operations of one round in a slot; `end` is called when they are done, before the slot is used
    again.
    """
    in_flight: deque[tuple[int, list[dist.Work]]] = deque()

    def finish() -> None:
        slot, works = in_flight.popleft()
        for work in works:
            work.wait()
        end(slot)

    for number, together in enumerate(rounds):
        if len(in_flight) == _SLOTS:
            finish()
        slot = number % _SLOTS
        in_flight.append((slot, dist.batch_isend_irecv(begin(slot, together))))
    while in_flight:
        finish()
