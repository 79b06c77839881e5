"""Weight sync by broadcast: over gloo between CPU processes, over NCCL between GPUs (SGLang's `from_distributed`).

The first rank of each pipeline stage shares a process group with all servers (`/init_weights_update_group`). It is rank
0 of this group, and each server has as many ranks as its tensor parallelism. All senders fill their buckets
concurrently, the next ones while the previous ones are sent; a server receives one bucket at a time, and all servers
receive them in the same order. A bucket is one contiguous buffer (SGLang's `flattened_bucket`).
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future

from exprl_megatron.policy.world import World
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.utils.together import gather_or_cancel
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.memory_transport import MemoryTransport
from exprl_megatron.weight_sync.rounds import send_rounds
from exprl_megatron.weight_sync.timing import SyncTimes
from exprl_megatron.weight_sync.weight_exporter import FilledBucket, WeightExporter
from exprl_megatron.weight_sync.weight_groups import CAUSE_S, WeightGroups, broadcast_error


class BroadcastTransport(MemoryTransport):
    """See Transport and MemoryTransport."""

    def __init__(
        self,
        clients: Sequence[SGLangClient],
        server_tp: int,
        world: World,
        coordinator: RankCoordinator,
        deadline_s: float,
    ):
        super().__init__(clients, server_tp, world, coordinator, deadline_s)
        self._groups = WeightGroups(server_tp, world, coordinator, deadline_s)

    def connect(self, clients: Sequence[SGLangClient]) -> None:
        """Push weights to these servers from now on; releases what was shared with the former ones. A collective."""
        self._groups.abort()
        self._clients = list(clients)

    async def push(self, exporter: WeightExporter, version: str, times: SyncTimes) -> None:
        """Send all rounds of `exporter` as `version` and add the seconds to `times`; rank 0 only.

        Raises:
            ServerError: a server refuses, dies or exceeds the deadline.
        """
        try:
            with self._coordinator.abort_on_error():
                await gather_or_cancel(
                    client.begin_weight_update(deadline_s=self._deadline_s) for client in self._clients
                )
                if not self._groups.names:
                    await self._groups.open(self._clients, exporter)
                await send_rounds(
                    len(exporter.rounds),
                    self._coordinator,
                    exporter.gather,
                    lambda number, filled: self._send(exporter, number, filled, version, times),
                )
                await gather_or_cancel(
                    client.end_weight_update(deadline_s=self._deadline_s) for client in self._clients
                )
                self._coordinator.signal()
        except BaseException:
            self._groups.abort()
            raise

    def follow(self, exporter: WeightExporter) -> None:
        """Take part in `push` on the other ranks.

        Raises:
            RankZeroFailed: rank 0 has an error.
        """
        try:
            if not self._groups.names:
                self._groups.follow_open(exporter)
            self._follow_rounds(exporter)
        except BaseException:
            self._groups.abort()
            raise

    async def close(self) -> None:
        """Release everything on the servers except the weights; rank 0 only."""
        await self._groups.close(self._clients)

    def follow_close(self) -> None:
        """Take part in `close` on the other ranks."""
        self._groups.follow_close()

    def _follow_rounds(self, exporter: WeightExporter) -> None:
        """Take part in every round; after a failed broadcast, wait for rank 0's abort: all ranks end together."""
        sent: dict[int, Future[float]] = {}
        failure: BaseException | None = None
        for number in range(len(exporter.rounds)):
            self._coordinator.wait_signal()
            # A server has answered for the round whose buffer is next, but one of its ranks may still be receiving.
            failure = failure or self._failure(sent.pop(number - 2, None))
            filled = exporter.gather(number)
            if filled is not None and failure is None:
                sent[number] = self._groups.send(filled)
        self._coordinator.wait_signal()
        for one in sent.values():
            failure = failure or self._failure(one)
        if failure is not None:
            raise failure

    def _failure(self, sending: Future[float] | None) -> BaseException | None:
        """Wait for a broadcast up to the deadline and return its exception, if any."""
        try:
            return None if sending is None else sending.exception(self._deadline_s)
        except TimeoutError as error:
            return error

    async def _send(
        self, exporter: WeightExporter, number: int, filled: FilledBucket | None, version: str, times: SyncTimes
    ) -> None:
        """Send all messages of a round to all servers, and add the times."""
        last = number == len(exporter.rounds) - 1
        messages = exporter.rounds[number]
        started = time.monotonic()
        replies = asyncio.ensure_future(
            gather_or_cancel(self._groups.ask(client, messages, version if last else None) for client in self._clients)
        )
        sent_s = 0.0
        try:
            if filled is not None:
                sent_s = await self._send_own(filled, replies) - started
            await replies
        finally:
            replies.cancel()
        elapsed_s = time.monotonic() - started
        times.moved += sum(message.nbytes for message in messages)
        times.send_s += sent_s
        times.load_s += elapsed_s - sent_s

    async def _send_own(self, filled: FilledBucket, replies: asyncio.Future) -> float:
        """Send rank 0's own message; returns the time when it was sent. Raises a server's refusal at its arrival."""
        sending = asyncio.wrap_future(self._groups.send(filled))
        await asyncio.wait({sending, replies}, return_when=asyncio.FIRST_EXCEPTION)
        try:
            if replies.done():
                replies.result()
            return await sending
        except RuntimeError as error:
            # The server's reply, or its absence, shows the cause.
            await asyncio.wait({replies}, timeout=CAUSE_S)
            if replies.done():
                replies.result()
            raise broadcast_error(self._clients, error) from error
