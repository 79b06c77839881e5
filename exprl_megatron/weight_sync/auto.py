"""Weight sync by `direct`, or by `broadcast` while a server cannot receive by `direct`."""

from collections.abc import Callable, Sequence

import torch

from exprl_megatron.policy.world import World
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.utils.together import gather_or_cancel
from exprl_megatron.weight_sync.broadcast import BroadcastTransport
from exprl_megatron.weight_sync.coordinator import RankCoordinator, RankZeroFailed
from exprl_megatron.weight_sync.direct import CannotReceive, DirectTransport
from exprl_megatron.weight_sync.timing import SyncTimes
from exprl_megatron.weight_sync.weight_exporter import WeightExporter


class AutoTransport:
    """See Transport. `log` receives a line, once for each set of servers, when `broadcast` is used, with the reason."""

    source_ranks = None

    def __init__(
        self,
        clients: Sequence[SGLangClient],
        server_tp: int,
        world: World,
        coordinator: RankCoordinator,
        deadline_s: float,
        *,
        log: Callable[[str], None],
    ):
        self._coordinator = coordinator
        self._log = log
        self._direct = DirectTransport(clients, server_tp, world, coordinator, deadline_s)
        self._broadcast = BroadcastTransport(clients, server_tp, world, coordinator, deadline_s)
        self._clients = list(clients)
        self._deadline_s = deadline_s
        self._refused = False
        """Whether one of these servers cannot receive by `direct`."""

    def connect(self, clients: Sequence[SGLangClient]) -> None:
        """Push weights to these servers from now on; releases what was shared with the former ones. A collective."""
        self._direct.connect(clients)
        self._broadcast.connect(clients)
        self._clients = list(clients)
        self._refused = False

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Allocate a bucket: uint8 [nbytes], in the memory that the chosen transport sends from."""
        return self._direct.allocate(nbytes)

    async def push(self, exporter: WeightExporter, version: str, times: SyncTimes) -> None:
        """Send all rounds of `exporter` as `version` and add the seconds to `times`; rank 0 only.

        Raises:
            ServerError: a server refuses, dies or exceeds the deadline.
        """
        if not self._refused:
            try:
                return await self._direct.push(exporter, version, times)
            except BaseException as error:
                # The other ranks have been aborted and wait for the next signal.
                with self._coordinator.abort_on_error():
                    if not isinstance(error, CannotReceive):
                        raise
                    self._log(f"weights travel by broadcast, not by direct: {error}")
                    await gather_or_cancel(
                        client.end_weight_update(deadline_s=self._deadline_s) for client in self._clients
                    )
                self._coordinator.signal()
            self._refused = True
        await self._broadcast.push(exporter, version, times)

    def follow(self, exporter: WeightExporter) -> None:
        """Take part in `push` on the other ranks.

        Raises:
            RankZeroFailed: rank 0 has an error.
        """
        if not self._refused:
            try:
                return self._direct.follow(exporter)
            except RankZeroFailed:
                self._coordinator.wait_signal()
            self._refused = True
        self._broadcast.follow(exporter)

    async def close(self) -> None:
        """Release everything on the servers except the weights; rank 0 only."""
        await self._direct.close()
        await self._broadcast.close()

    def follow_close(self) -> None:
        """Take part in `close` on the other ranks."""
        self._direct.follow_close()
        self._broadcast.follow_close()
