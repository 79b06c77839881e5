"""A trainer rank's part of a direct sync: sends its messages from the parameters."""

from concurrent.futures import Future

import torch
import torch.distributed as dist

from exprl_megatron.policy.gather import Gatherer
from exprl_megatron.policy.world import World
from exprl_megatron.serving.process_groups import in_background, on_device
from exprl_megatron.serving.staging_buffers import StagingBuffers, run_rounds
from exprl_megatron.serving.transfer_tables import Transfer
from exprl_megatron.weight_sync.p2p_schedule import TransferPlan


class P2PSender:
    """Sends all messages of `world`'s rank in every sync by `plan`."""

    def __init__(self, plan: TransferPlan, world: World):
        self._device = world.device
        self._sends = plan.sends(world.rank)
        numbers = set(self._sends.parts["of"].tolist())
        self._parameters = {number: plan.held.parameters[number] for number in numbers}

    def begin(self, gatherer: Gatherer, group: dist.ProcessGroup) -> Future[None]:
        """Start to send all messages to the members of `group`, on a thread."""
        buffers = StagingBuffers(gatherer.dtype, self._device)

        def begin(slot: int, transfers: list[Transfer]) -> list[dist.P2POp]:
            pieces, copies = buffers.take(slot, [self._cuts(gatherer, transfer) for transfer in transfers])
            for part, place in copies:
                place.copy_(part)
            return [
                dist.P2POp(dist.isend, piece, group=group, group_peer=transfer.peer)
                for piece, transfer in zip(pieces, transfers, strict=True)
            ]

        def work() -> None:
            with on_device(self._device), torch.no_grad():
                run_rounds(self._sends.rounds(), begin)
                if self._device.type == "cuda":
                    torch.cuda.synchronize()

        return in_background("weights", work)

    def _cuts(self, gatherer: Gatherer, transfer: Transfer) -> list[torch.Tensor]:
        """Return views of a transfer's parts in this rank's parameters."""
        cuts = []
        for part in transfer.parts:
            own = gatherer.own(self._parameters[part.of])
            if own.dtype != gatherer.dtype:
                own = own.view(gatherer.dtype)
            rows = own if own.dim() == 2 else own.view(len(own), -1)
            cuts.append(rows.narrow(0, part.row, part.rows).narrow(1, part.column, part.columns))
        return cuts
