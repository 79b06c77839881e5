"""A trainer rank's part of a direct sync: its messages, from where the weights are."""

from concurrent.futures import Future

import torch
import torch.distributed as dist

from exprl_megatron.policy.gather import Gatherer
from exprl_megatron.policy.world import World
from exprl_megatron.serving.delivery_rounds import Lanes, in_rounds
from exprl_megatron.serving.delivery_tables import Delivery
from exprl_megatron.serving.own_group import in_background, on_device
from exprl_megatron.weight_sync.deliveries import DeliveryPlan


class Sending:
    """What `world`'s rank sends in every sync by `plan`."""

    def __init__(self, plan: DeliveryPlan, world: World):
        self._device = world.device
        self._sends = plan.sends(world.rank)
        numbers = set(self._sends.parts["of"].tolist())
        self._parameters = {number: plan.held.parameters[number] for number in numbers}

    def begin(self, gatherer: Gatherer, group: dist.ProcessGroup) -> Future[None]:
        """Send all of it to the members of `group`, on a thread."""
        lanes = Lanes(gatherer.dtype, self._device)

        def begin(lane: int, deliveries: list[Delivery]) -> list[dist.P2POp]:
            pieces, copies = lanes.take(lane, [self._cuts(gatherer, delivery) for delivery in deliveries])
            for part, place in copies:
                place.copy_(part)
            return [
                dist.P2POp(dist.isend, piece, group=group, group_peer=delivery.peer)
                for piece, delivery in zip(pieces, deliveries, strict=True)
            ]

        def work() -> None:
            with on_device(self._device), torch.no_grad():
                in_rounds(self._sends.rounds(), begin)
                if self._device.type == "cuda":
                    torch.cuda.synchronize()

        return in_background("weights", work)

    def _cuts(self, gatherer: Gatherer, delivery: Delivery) -> list[torch.Tensor]:
        """A delivery's parts where they are on this rank."""
        cuts = []
        for part in delivery.parts:
            own = gatherer.own(self._parameters[part.of])
            if own.dtype != gatherer.dtype:
                own = own.view(gatherer.dtype)
            rows = own if own.dim() == 2 else own.view(-1, 1)
            cuts.append(rows.narrow(0, part.row, part.rows).narrow(1, part.column, part.columns))
        return cuts
