"""The groups in which weights are broadcast: each pipeline stage's first rank, as rank 0, with all servers.

NCCL connects a group in its first operation, which blocks its caller until all members have called it. So the first
operation is a small message, sent on a thread right after the group was formed, together with the requests that make
the servers receive it.
"""

import asyncio
import secrets
from collections.abc import Collection, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from exprl_megatron.errors import RequestRefused, ServerError
from exprl_megatron.models.shards import sender
from exprl_megatron.policy.world import World
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.process_groups import GroupThread, abort, destroy, in_background, on_device
from exprl_megatron.utils.accelerator import group_backend
from exprl_megatron.utils.required import required
from exprl_megatron.utils.together import gather_or_cancel
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.groups import (
    abort_group,
    address_towards,
    broadcast,
    follow_destroy,
    group_name,
    host_of,
    init_group,
    rendezvous_store,
)
from exprl_megatron.weight_sync.messages import Message
from exprl_megatron.weight_sync.weight_exporter import FilledBucket, WeightExporter

CAUSE_S = 5.0
"""Seconds to wait for a server's own error after a broadcast failed, or for any reply of it."""


class WeightGroups:
    """The groups of one set of servers; every rank has an object. Each server has `server_tp` ranks in each group."""

    def __init__(self, server_tp: int, world: World, coordinator: RankCoordinator, deadline_s: float):
        self.names: list[str] = []
        """Names of the stages' groups; empty where the groups are not open."""
        self._server_tp = server_tp
        self._world = world
        self._coordinator = coordinator
        self._deadline_s = deadline_s
        self._size = 0
        """Number of members of each group."""
        self._group: dist.ProcessGroup | None = None
        """This rank's group, if it is a sender."""
        self._thread: GroupThread | None = None
        self._place: dist.TCPStore | None = None
        """The store in which this rank meets the servers, if it is a sender."""
        self._left: list[tuple[SGLangClient, str]] = []
        """Servers, and names of groups that they may still be in after this side has left them."""

    async def open(self, clients: Sequence[SGLangClient], exporter: WeightExporter) -> None:
        """Form and connect each stage's group, in order; rank 0 only, in an open weight update.

        Raises ServerError naming the servers that do not join within the deadline.
        """
        for client, name in self._left:
            if client in clients:
                # A server that never became a member refuses.
                with suppress(RequestRefused):
                    await client.destroy_weights_group(name, deadline_s=self._deadline_s)
        self._left = []
        # The members meet under this name, which the servers receive over HTTP, with the run's key.
        name = group_name(secrets.token_hex(16))
        self.names = [f"{name}-{stage}" for stage in range(self._world.layout.pp)]
        self._left = [(client, name) for name in self.names for client in clients]
        self._size = 1 + self._server_tp * len(clients)
        host = host_of(clients[0].url)
        place = self._open_store(host)
        self._coordinator.signal((self.names, host, self._size))
        collected = required(self._coordinator.collect(place), "the places of all senders")
        places = [each for each in collected if each is not None]
        meeting = asyncio.wrap_future(self._init_group(self.names[0], required(place, "the store of rank 0")))
        joining = {
            client: self._join_server(client, 1 + i * self._server_tp, places) for i, client in enumerate(clients)
        }
        await self._wait_for_servers(joining, {meeting}, 0)
        self._use_group(meeting.result())
        for stage in range(self._world.layout.pp):
            self._coordinator.signal()
            filled = await asyncio.to_thread(exporter.gather_smallest, stage)
            own = set() if filled is None else {asyncio.wrap_future(self.send(filled))}
            message = exporter.smallest_messages[stage]
            await self._wait_for_servers({client: self.ask(client, [message], None) for client in clients}, own, stage)

    def follow_open(self, exporter: WeightExporter) -> None:
        """Take part in `open` on the other ranks."""
        self.names, host, self._size = self._coordinator.wait_signal()
        place = self._open_store(host)
        self._coordinator.collect(place)
        meeting = None
        if place is not None:
            meeting = self._init_group(self.names[self._world.pp_rank], place)
        for stage in range(self._world.layout.pp):
            self._coordinator.wait_signal()
            if meeting is not None and self._group is None:
                # Rank 0 signals when all servers have joined.
                self._use_group(meeting.result(self._deadline_s))
            filled = exporter.gather_smallest(stage)
            if filled is not None:
                # Rank 0 learns from the servers whether it arrives.
                self.send(filled)

    def send(self, filled: FilledBucket) -> Future[float]:
        """Start to broadcast this rank's message in its group; the future has the time when it was sent."""
        group = required(self._group, "the group of this rank")
        return required(self._thread, "the thread of the group").submit(lambda: broadcast(group, filled.data))

    async def ask(self, client: SGLangClient, messages: Sequence[Message], version: str | None) -> None:
        """Make one server receive `messages`, in this order; the last one sets its weight `version`, if given."""
        for position, message in enumerate(messages):
            final = version is not None and position == len(messages) - 1
            await client.update_from_distributed(
                [slot.name for slot in message.slots],
                [slot.dtype for slot in message.slots],
                [slot.shape for slot in message.slots],
                group=self.names[message.stage],
                version=version if final else None,
                flush_cache=final,
                flattened=True,
                deadline_s=self._deadline_s,
            )

    def abort(self) -> None:
        """Abort this side of the groups, also with operations in flight."""
        group = self._take_group()
        if group is not None:
            abort_group(group, 0, self._size)
        # A server that has joined already does not wait for the others then.
        self._place = None

    async def close(self, clients: Sequence[SGLangClient]) -> None:
        """Destroy the groups, which must be idle, where they are open; rank 0 only."""
        if not self.names:
            return
        names, self._left = self.names, []
        group = required(self._take_group(), "the group of rank 0")

        async def leave(client: SGLangClient) -> None:
            for name in names:
                await client.destroy_weights_group(name, deadline_s=self._deadline_s)

        try:
            with self._coordinator.abort_on_error():
                # NCCL may wait for all members of a group before one of them has given it up.
                await gather_or_cancel([asyncio.to_thread(destroy, group, self._deadline_s), *map(leave, clients)])
                self._coordinator.signal()
        except ServerError:
            abort(group)
            raise
        finally:
            self._place = None

    def follow_close(self) -> None:
        """Take part in `close` on the other ranks."""
        if self.names:
            follow_destroy(self._take_group(), self._coordinator, self._deadline_s)
            self._place = None

    def _take_group(self) -> dist.ProcessGroup | None:
        """Take this rank's group, if it is a sender, to be destroyed; no group is open from now on."""
        group, self._group, self.names = self._group, None, []
        if group is not None:
            required(self._thread, "the thread of the group").stop()
        return group

    async def _wait_for_servers(
        self, asked: Mapping[SGLangClient, Coroutine[Any, Any, None]], own: Collection[asyncio.Future], stage: int
    ) -> None:
        """Wait until all servers have answered the requests `asked`, and `own` is done.

        Raises the first server's error, or ServerError naming the servers that did not answer within the deadline.
        """
        asking = {asyncio.ensure_future(request): client for client, request in asked.items()}
        try:
            done, late = await asyncio.wait(
                {*asking, *own}, timeout=self._deadline_s, return_when=asyncio.FIRST_EXCEPTION
            )
            if late and any(future in own and future.exception() for future in done):
                # The server's own error says why, or the lack of a reply does.
                more, late = await asyncio.wait(late, timeout=CAUSE_S, return_when=asyncio.FIRST_EXCEPTION)
                done |= more
            for future in sorted(done, key=lambda future: future in own):
                future.result()
        except RuntimeError as error:
            raise broadcast_error(asking.values(), error) from error
        finally:
            for future in asking:
                future.cancel()
        if late:
            raise ServerError(
                await self._late_servers([client for future, client in asking.items() if future in late], stage)
            )

    async def _late_servers(self, late: Sequence[SGLangClient], stage: int) -> str:
        """Return which late server blocks the group: one that answers no other request either, if there is one."""

        async def answers(client: SGLangClient) -> bool:
            try:
                await client.info(deadline_s=CAUSE_S)
            except ServerError:
                return False
            return True

        well = await gather_or_cancel(answers(client) for client in late)
        absent = [client for client, answered in zip(late, well, strict=True) if not answered]
        who = [f"{client.name} ({client.url})" for client in absent or late]
        source = sender(stage, self._world.layout)
        if not absent and source != self._world.rank:
            who.append(f"trainer-{source}")
        return (
            f"{' or '.join(who)} did not join the weights group of pipeline stage {stage} within sync.deadline_s "
            f"({self._deadline_s:g} s)."
        )

    def _use_group(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._thread = GroupThread(self.names[self._world.pp_rank])

    def _init_group(self, name: str, place: tuple[str, int]) -> Future[dist.ProcessGroup]:
        """Start to form a group as its rank 0."""

        def work() -> dist.ProcessGroup:
            # A thread's current GPU is the first one until it is set.
            with on_device(self._world.device):
                return init_group(name, *place, 0, self._size, self._deadline_s)

        return in_background(name, work)

    def _open_store(self, host: str) -> tuple[str, int] | None:
        """Open the store in which servers on `host` meet this rank, if it is a sender; returns its address and port."""
        if self._world.rank != sender(self._world.pp_rank, self._world.layout):
            return None
        address = address_towards(host)
        self._place = rendezvous_store(address, self._deadline_s)
        return address, self._place.port

    async def _join_server(self, client: SGLangClient, rank_offset: int, places: list[tuple[str, int]]) -> None:
        for name, (address, port) in zip(self.names, places, strict=True):
            await client.init_weights_group(
                master_address=address,
                master_port=port,
                rank_offset=rank_offset,
                world_size=self._size,
                group=name,
                backend=group_backend(),
                deadline_s=self._deadline_s,
            )


def broadcast_error(clients: Collection[SGLangClient], error: RuntimeError) -> ServerError:
    """Return the error where this side of a broadcast fails and no server says why."""
    return ServerError(f"The weight broadcast to {', '.join(client.name for client in clients)} broke: {error}.")
