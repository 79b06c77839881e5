"""The common part of the transports that send weights from memory to memory."""

from collections.abc import Sequence

import torch

from exprl_megatron.policy.world import World
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.weight_sync.coordinator import RankCoordinator


class MemoryTransport:
    """Base of the transports from memory to memory; every rank makes one with the same arguments.

    `server_tp` is the tensor parallelism of each server; `clients` are needed on rank 0 alone.
    """

    source_ranks: tuple[tuple[int, ...], ...] | None = None
    """See Transport.source_ranks."""

    def __init__(
        self,
        clients: Sequence[SGLangClient],
        server_tp: int,
        world: World,
        coordinator: RankCoordinator,
        deadline_s: float,
    ):
        self._clients = list(clients)
        self._server_tp = server_tp
        self._world = world
        self._coordinator = coordinator
        self._deadline_s = deadline_s

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Allocate a bucket: uint8 [nbytes], on this rank's device."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._world.device)
