"""Weights by broadcast groups: gloo between CPU processes, NCCL between GPUs.

Each pipeline stage's first rank has a group of its own with all servers (`/init_weights_update_group`), in which it is
rank 0 and each server takes as many ranks as its tensor parallelism has. All senders fill their buckets side by side,
the next ones while the last are sent; a server takes one bucket at a time, and all servers in the same order. A bucket
goes as one piece of memory (SGLang's `flattened_bucket`).
"""

import asyncio
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from exprl_megatron.errors import ServerError
from exprl_megatron.policy.world import World
from exprl_megatron.resharding.control import Control
from exprl_megatron.resharding.groups import address_towards, backend, in_background, meet, meeting_place
from exprl_megatron.resharding.messages import Message, sender
from exprl_megatron.resharding.outgoing import Filled, Outgoing
from exprl_megatron.resharding.rounds import push_rounds
from exprl_megatron.resharding.timing import SyncTimes
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.together import together

_POLL_S = 0.001


class BroadcastTransport:
    """See Transport. `server_tp` is the tensor parallelism of each server; `clients` are needed on rank 0 alone."""

    fillers = None

    def __init__(
        self, clients: Sequence[SGLangClient], server_tp: int, world: World, control: Control, deadline_s: float
    ):
        self._clients = clients
        self._server_tp = server_tp
        self._world = world
        self._control = control
        self._deadline_s = deadline_s
        self._group: dist.ProcessGroup | None = None
        self._place_here: dist.TCPStore | None = None
        """Where this rank meets the servers, if it is a sender."""
        self._names: list[str] = []
        """The stages' groups, once they are open."""
        self._left: list[tuple[SGLangClient, str]] = []
        """Servers, and groups that they are still in although we have left them."""

    def enlist(self, clients: Sequence[SGLangClient]) -> None:
        stay = [client for client in self._clients if client in clients]
        self._left = [(client, name) for name in self._names for client in stay]
        self._clients = list(clients)
        self._leave()

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._world.device)

    async def push(self, outgoing: Outgoing, version: str, times: SyncTimes) -> None:
        if not self._names:
            try:
                await self._open()
            except BaseException:
                # A server that has come already does not wait for one that has not.
                self._leave()
                raise
        await push_rounds(
            len(outgoing.rounds),
            self._control,
            self._clients,
            outgoing.gather,
            lambda number, filled: self._send(outgoing, number, filled, version, times),
        )

    def follow(self, outgoing: Outgoing) -> None:
        if not self._names:
            try:
                self._follow_open()
            except BaseException:
                self._leave()
                raise
        works: dict[int, dist.Work] = {}
        for number in range(len(outgoing.rounds)):
            self._control.await_go()
            # A server has answered for the round whose memory comes next, but one of its ranks may still be reading.
            if number - 2 in works:
                works.pop(number - 2).wait()
            filled = outgoing.gather(number)
            if filled is not None:
                works[number] = self._broadcast(filled)
        self._control.await_go()
        for work in works.values():
            work.wait()

    async def close(self) -> None:
        for name in self._names:
            await together(client.destroy_weights_group(name) for client in self._clients)
        self._leave()

    def names(self) -> list[str]:
        """The groups that servers are in, one for each pipeline stage; empty before the first push."""
        return list(self._names)

    async def _open(self) -> None:
        """All servers meet each sender in a new group, one group after the other."""
        with self._control.leading():
            for client, name in self._left:
                await client.destroy_weights_group(name)
            self._left = []
            run = uuid.uuid4().hex[:8]
            names = [f"exprl-weights-{run}-{stage}" for stage in range(self._world.layout.pp)]
            world_size = 1 + self._server_tp * len(self._clients)
            host = urlsplit(self._clients[0].url).hostname
            place = self._place(host)
            self._control.go((names, host, world_size))
            places = [place for place in self._control.collect(place) if place is not None]
            meeting = asyncio.wrap_future(self._meet(names[0], place, world_size))
            joining = asyncio.gather(
                *(
                    self._join_server(client, 1 + i * self._server_tp, world_size, names, places)
                    for i, client in enumerate(self._clients)
                )
            )
            # A refusal ends the wait: the thread that meets the servers gives up by itself.
            done, _ = await asyncio.wait({joining, meeting}, return_when=asyncio.FIRST_EXCEPTION)
            for future in done:
                future.result()
            self._group, self._names = meeting.result(), names
            self._control.go()

    def _leave(self) -> None:
        """Give our side of the groups up."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
        self._group, self._place_here, self._names = None, None, []

    def _follow_open(self) -> None:
        names, host, world_size = self._control.await_go()
        place = self._place(host)
        self._control.collect(place)
        meeting = None
        if place is not None:
            meeting = self._meet(names[self._world.pp_rank], place, world_size)
        self._control.await_go()
        if meeting is not None:
            self._group = meeting.result(self._deadline_s)
        self._names = names

    def _meet(self, name: str, place: tuple[str, int], world_size: int) -> Future[dist.ProcessGroup]:
        """Begin to form a group as its rank 0; done when all servers have joined."""
        return in_background(name, lambda: meet(name, *place, 0, world_size, self._deadline_s))

    def _place(self, host: str) -> tuple[str, int] | None:
        """Where servers on `host` find this rank, if it is a sender."""
        if self._world.rank != sender(self._world.pp_rank, self._world.layout):
            return None
        address = address_towards(host)
        self._place_here = meeting_place(address, self._deadline_s)
        return address, self._place_here.port

    async def _join_server(
        self,
        client: SGLangClient,
        rank_offset: int,
        world_size: int,
        names: list[str],
        places: list[tuple[str, int]],
    ) -> None:
        for name, (address, port) in zip(names, places, strict=True):
            await client.init_weights_group(
                master_address=address,
                master_port=port,
                rank_offset=rank_offset,
                world_size=world_size,
                group=name,
                backend=backend(),
                deadline_s=self._deadline_s,
            )

    def _broadcast(self, filled: Filled) -> dist.Work:
        return dist.broadcast(filled.data, group=self._group, group_src=0, async_op=True)

    async def _send(
        self, outgoing: Outgoing, number: int, filled: Filled | None, version: str, times: SyncTimes
    ) -> None:
        """All messages of a round to all servers."""
        last = number == len(outgoing.rounds) - 1
        messages = outgoing.rounds[number]
        started = time.monotonic()
        replies = asyncio.ensure_future(
            together(self._ask(client, messages, version if last else None) for client in self._clients)
        )
        sent_s = 0.0
        if filled is not None:
            sent_s = await self._send_own(filled, replies) - started
        await replies
        taken_s = time.monotonic() - started
        times.moved += sum(message.nbytes for message in messages)
        times.send_s += sent_s
        times.load_s += taken_s - sent_s

    async def _send_own(self, filled: Filled, replies: asyncio.Future) -> float:
        """The time when rank 0's own message was sent; raises at once what a server replies that refuses to take it."""
        work = self._broadcast(filled)
        try:
            while not work.is_completed():
                if replies.done():
                    replies.result()
                await asyncio.sleep(_POLL_S)
            work.wait()
        except RuntimeError as error:
            # The connection broke: the server's own reply, or its absence, says why.
            await replies
            names = ", ".join(client.name for client in self._clients)
            raise ServerError(f"The weight broadcast to {names} broke: {error}.") from error
        return time.monotonic()

    async def _ask(self, client: SGLangClient, messages: Sequence[Message], version: str | None) -> None:
        """One server to take all messages of a round, in the order in which every server takes them."""
        for position, message in enumerate(messages):
            final = version is not None and position == len(messages) - 1
            await client.update_from_distributed(
                [slot.name for slot in message.slots],
                [slot.dtype for slot in message.slots],
                [slot.shape for slot in message.slots],
                group=self._names[message.stage],
                version=version if final else None,
                flush_cache=final,
                flattened=True,
                deadline_s=self._deadline_s,
            )
