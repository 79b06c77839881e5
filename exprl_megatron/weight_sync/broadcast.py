"""Weights by broadcast groups: gloo between CPU processes, NCCL between GPUs.

Each pipeline stage's first rank has a group of its own with all servers (`/init_weights_update_group`), in which it is
rank 0 and each server takes as many ranks as its tensor parallelism has. All senders fill their buckets side by side,
the next ones while the last are sent; a server takes one bucket at a time, and all servers in the same order. A bucket
goes as one piece of memory (SGLang's `flattened_bucket`).
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future

import torch

from exprl_megatron.policy.world import World
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.utils.together import gather_or_cancel
from exprl_megatron.weight_sync.control import Control
from exprl_megatron.weight_sync.outgoing import Filled, Outgoing
from exprl_megatron.weight_sync.rounds import send_rounds
from exprl_megatron.weight_sync.timing import SyncTimes
from exprl_megatron.weight_sync.weight_groups import CAUSE_S, WeightGroups, broke


class BroadcastTransport:
    """See Transport. `server_tp` is the tensor parallelism of each server; `clients` are needed on rank 0 alone."""

    fillers = None

    def __init__(
        self, clients: Sequence[SGLangClient], server_tp: int, world: World, control: Control, deadline_s: float
    ):
        self._clients = clients
        self._world = world
        self._control = control
        self._deadline_s = deadline_s
        self._groups = WeightGroups(server_tp, world, control, deadline_s)

    def enlist(self, clients: Sequence[SGLangClient]) -> None:
        self._groups.break_off()
        self._clients = list(clients)

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._world.device)

    async def push(self, outgoing: Outgoing, version: str, times: SyncTimes) -> None:
        try:
            with self._control.leading():
                await gather_or_cancel(
                    client.begin_weight_update(deadline_s=self._deadline_s) for client in self._clients
                )
                if not self._groups.names:
                    await self._groups.open(self._clients, outgoing)
                await send_rounds(
                    len(outgoing.rounds),
                    self._control,
                    outgoing.gather,
                    lambda number, filled: self._send(outgoing, number, filled, version, times),
                )
                await gather_or_cancel(
                    client.end_weight_update(deadline_s=self._deadline_s) for client in self._clients
                )
                self._control.go()
        except BaseException:
            self._groups.break_off()
            raise

    def follow(self, outgoing: Outgoing) -> None:
        try:
            if not self._groups.names:
                self._groups.follow_open(outgoing)
            self._follow_rounds(outgoing)
        except BaseException:
            self._groups.break_off()
            raise

    async def close(self) -> None:
        await self._groups.close(self._clients)

    def follow_close(self) -> None:
        self._groups.follow_close()

    def _follow_rounds(self, outgoing: Outgoing) -> None:
        """Where a broadcast breaks this rank keeps step with the others until rank 0, which learns it, stops them."""
        sent: dict[int, Future[float]] = {}
        broken: BaseException | None = None
        for number in range(len(outgoing.rounds)):
            self._control.await_go()
            # A server has answered for the round whose memory comes next, but one of its ranks may still be reading.
            broken = broken or self._failure(sent.pop(number - 2, None))
            filled = outgoing.gather(number)
            if filled is not None and broken is None:
                sent[number] = self._groups.send(filled)
        self._control.await_go()
        for one in sent.values():
            broken = broken or self._failure(one)
        if broken is not None:
            raise broken

    def _failure(self, sending: Future[float] | None) -> BaseException | None:
        """What a broadcast failed of, once it is over or has had its time."""
        try:
            return sending and sending.exception(self._deadline_s)
        except TimeoutError as error:
            return error

    async def _send(
        self, outgoing: Outgoing, number: int, filled: Filled | None, version: str, times: SyncTimes
    ) -> None:
        """All messages of a round to all servers."""
        last = number == len(outgoing.rounds) - 1
        messages = outgoing.rounds[number]
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
        taken_s = time.monotonic() - started
        times.moved += sum(message.nbytes for message in messages)
        times.send_s += sent_s
        times.load_s += taken_s - sent_s

    async def _send_own(self, filled: Filled, replies: asyncio.Future) -> float:
        """The time when rank 0's own message was sent; raises at once what a server replies that refuses to take it."""
        sending = asyncio.wrap_future(self._groups.send(filled))
        await asyncio.wait({sending, replies}, return_when=asyncio.FIRST_EXCEPTION)
        try:
            if replies.done():
                replies.result()
            return await sending
        except RuntimeError as error:
            # The server's own reply says why, or its absence.
            await asyncio.wait({replies}, timeout=CAUSE_S)
            if replies.done():
                replies.result()
            raise broke(self._clients, error) from error
