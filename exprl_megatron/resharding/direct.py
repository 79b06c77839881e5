"""Weights from each trainer rank's shard straight into the servers' parameters, by point-to-point messages.

Nothing is joined and nothing is sent twice: a server's rank is sent what it holds, by the ranks that have it, in one
group of all trainer and server ranks (gloo between CPU processes, NCCL between GPUs). What it holds, each server's rank
finds out from its own model (serving/loader_trace.py).
"""

import asyncio
import json
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from exprl_megatron.accelerator import group_backend
from exprl_megatron.errors import ServerError, UserError
from exprl_megatron.policy.world import World
from exprl_megatron.resharding.control import Control
from exprl_megatron.resharding.deliveries import Where, plan_deliveries, shares
from exprl_megatron.resharding.gather import Gatherer
from exprl_megatron.resharding.groups import address_towards, break_off, meet, meeting_place, timeout_s
from exprl_megatron.resharding.messages import ITEMSIZE
from exprl_megatron.resharding.outgoing import Outgoing
from exprl_megatron.resharding.timing import SyncTimes
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.delivery_rounds import Lanes, in_rounds
from exprl_megatron.serving.loader_orders import BROKEN_OFF, LOADER, NOT_FOLLOWED, Delivery, Need, payload
from exprl_megatron.serving.own_group import abort, destroy, in_background, on_device
from exprl_megatron.together import together

_CAUSE_S = 5.0


class CannotReceive(UserError):
    """A server is well, but cannot be sent shards: it has another loader, or one that cannot be followed."""


class DirectTransport:
    """See Transport. `server_tp` is the tensor parallelism of each server; `clients` are needed on rank 0 alone."""

    fillers = None

    def __init__(
        self, clients: Sequence[SGLangClient], server_tp: int, world: World, control: Control, deadline_s: float
    ):
        self._clients = list(clients)
        self._server_tp = server_tp
        self._world = world
        self._control = control
        self._deadline_s = deadline_s
        self._store: dist.TCPStore | None = None
        self._name = ""
        self._size = 0
        """Of the group."""
        self._group: dist.ProcessGroup | None = None
        self._sources: dict[Delivery, tuple[Where, ...]] = {}
        """What this rank sends, in order, and where it has the parts."""
        self._moved = 0
        """Bytes to one server."""
        self._orders = 0

    def enlist(self, clients: Sequence[SGLangClient]) -> None:
        self._break_off()
        self._clients = list(clients)

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._world.device)

    async def push(self, outgoing: Outgoing, version: str, times: SyncTimes) -> None:
        try:
            with self._control.leading():
                await together(client.begin_weight_update() for client in self._clients)
                if self._group is None:
                    await self._open(outgoing)
                started = time.monotonic()
                self._control.go()
                await self._send(outgoing)
                sent_s = time.monotonic()
                await self._order("finish", version=version)
                await together(client.end_weight_update() for client in self._clients)
                self._control.go()
        except BaseException:
            self._break_off()
            raise
        times.send_s += sent_s - started
        times.load_s += time.monotonic() - sent_s
        times.moved += self._moved

    def follow(self, outgoing: Outgoing) -> None:
        try:
            if self._group is None:
                self._follow_open(outgoing)
            self._control.await_go()
            sending = self._begin_to_send(outgoing)
            self._control.await_go()
            sending.result()
        except BaseException:
            self._break_off()
            raise

    async def close(self) -> None:
        group = self._group
        if group is not None:
            try:
                await together(client.begin_weight_update() for client in self._clients)
                # NCCL may wait for all members of a group before one of them has given it up.
                await together([self._order("leave"), asyncio.to_thread(self._destroy)])
                await together(client.end_weight_update() for client in self._clients)
            except ServerError:
                abort(group)
                self._group = None
                raise
        self._store = None

    def follow_close(self) -> None:
        self._destroy()

    def _destroy(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            destroy(group, self._deadline_s)

    def _break_off(self) -> None:
        """Let servers go that wait for what is not sent any more, or for the others in a group that does not form."""
        group, self._group = self._group, None
        if self._store is not None:
            self._store.set(BROKEN_OFF, "")
        if group is not None:
            break_off(group, self._world.rank, self._size)
        self._store = None

    async def _open(self, outgoing: Outgoing) -> None:
        """All ranks and servers meet in a new group; everybody learns what the servers hold."""
        for client in self._clients:
            if LOADER not in await client.loaders():
                raise CannotReceive(
                    f"{client.name} ({client.url}) was started without --custom-weight-loader {LOADER}, which "
                    f"sync.transport direct needs; start it with exprl serve, or use broadcast."
                )
        address = address_towards(urlsplit(self._clients[0].url).hostname)
        self._store = meeting_place(address, self._deadline_s)
        gatherer = outgoing.gatherer
        told = {"dtype": _word(gatherer.dtype), "shapes": gatherer.shapes}
        self._store.set("tensors", json.dumps(told))
        self._name = f"exprl-weights-{uuid.uuid4().hex[:8]}"
        self._size = self._world.layout.world_size + self._server_tp * len(self._clients)
        self._control.go((self._name, self._size, address, self._store.port))
        meeting = asyncio.wrap_future(self._meet(address, self._store.port))
        await self._join(meeting)
        told = {rank: self._store.get(f"needs/{rank}") for rank in range(self._world.layout.world_size, self._size)}
        # Of servers that are alike once.
        once = {text: text for text in told.values()}
        needs = [[once[told[rank]] for rank in self._ranks(server)] for server in range(len(self._clients))]
        self._control.go(needs)
        self._group = meeting.result()
        self._plan(outgoing, needs)

    async def _join(self, meeting: asyncio.Future) -> None:
        """Return when all are members. Raises ServerError naming who has not come within the deadline."""
        started = time.monotonic()
        try:
            await self._both(meeting, "join")
        except ServerError as error:
            absent = self._absent() if time.monotonic() - started >= self._deadline_s else []
            if not absent:
                raise
            raise ServerError(
                f"{', '.join(absent)} did not join the weights group within sync.deadline_s ({self._deadline_s:g} s)."
            ) from error

    def _absent(self) -> list[str]:
        """The servers of which a rank has not said what it holds, as each does before it joins."""
        return [
            f"{client.name} ({client.url})"
            for server, client in enumerate(self._clients)
            if self._store is not None and not self._store.check([f"needs/{rank}" for rank in self._ranks(server)])
        ]

    def _follow_open(self, outgoing: Outgoing) -> None:
        self._name, self._size, address, port = self._control.await_go()
        meeting = self._meet(address, port)
        needs = self._control.await_go()
        self._group = meeting.result(self._deadline_s)
        self._plan(outgoing, needs)

    def _meet(self, address: str, port: int) -> Future[dist.ProcessGroup]:
        """Begin to form the group of all ranks and servers."""

        def work() -> dist.ProcessGroup:
            with on_device(self._world.device):
                group = meet(self._name, address, port, self._world.rank, self._size, self._deadline_s)
                # NCCL wants every member in the first thing that a group does.
                dist.all_reduce(torch.zeros(1, device=self._world.device), group=group)
                return group

        return in_background(self._name, work)

    def _plan(self, outgoing: Outgoing, told: list[list[bytes]]) -> None:
        """Who sends what, from what each server's ranks told; rank 0 tells them what they get."""
        read = {text: [Need(*need) for need in json.loads(text)] for server in told for text in server}
        needs = [[read[text] for text in server] for server in told]
        dtype = _word(outgoing.gatherer.dtype)
        held = shares(outgoing.architecture, self._world.layout, self._world.device.type == "cuda")
        everything = plan_deliveries(needs, held, self._world.layout, dtype, outgoing.bucket_bytes)
        self._sources = {one.delivery: one.sources for one in everything if one.delivery.source == self._world.rank}
        if self._control.here:
            self._moved = sum(one.delivery.count for one in everything) * ITEMSIZE[dtype] // len(needs)
            for rank in range(self._world.layout.world_size, self._size):
                own = [one.delivery for one in everything if one.delivery.target == rank]
                self._store.set(f"deliveries/{rank}", json.dumps(own))

    def _ranks(self, server: int) -> range:
        """A server's ranks in the group."""
        first = self._world.layout.world_size + server * self._server_tp
        return range(first, first + self._server_tp)

    async def _order(self, what: str, version: str | None = None) -> None:
        """All servers to do something (see serving/loader.py). Raises ServerError with what one could not."""
        self._orders += 1
        await together(self._order_one(what, server, version) for server in range(len(self._clients)))

    async def _order_one(self, what: str, server: int, version: str | None) -> None:
        client = self._clients[server]
        order = {
            "do": what,
            "answer": f"answer {self._orders}",
            "group": self._name,
            "backend": group_backend(),
            "address": self._store.host,
            "port": self._store.port,
            "world_size": self._size,
            "deadline_s": self._deadline_s,
            "timeout_s": timeout_s(self._deadline_s),
        }
        await client.update_from_tensor(
            [payload(order | {"rank": rank}) for rank in self._ranks(server)],
            version=version,
            flush_cache=version is not None,
            loader=LOADER,
            deadline_s=self._deadline_s,
        )
        for rank in self._ranks(server):
            said = self._said(f"{order['answer']}/{rank}")
            if NOT_FOLLOWED in said:
                raise CannotReceive(f"{client.name} ({client.url}) could not {what} weights: {said}.")
            if said:
                raise ServerError(f"{client.name} ({client.url}) could not {what} weights: {said}; see its log.")

    def _said(self, answer: str) -> str:
        """A server's rank's answer to an order; "" is well."""
        if self._store is None:
            return "the group was broken off"
        return self._store.get(answer).decode() if self._store.check([answer]) else "it did not answer"

    async def _send(self, outgoing: Outgoing) -> None:
        await self._both(asyncio.wrap_future(self._begin_to_send(outgoing)), "receive")

    async def _both(self, own: asyncio.Future, what: str) -> None:
        """Return when our side and the servers are through. What a server says is the cause, where both fail."""
        servers = asyncio.ensure_future(self._order(what))
        # Nobody may look at it any more.
        own.add_done_callback(lambda future: future.cancelled() or future.exception())
        try:
            await asyncio.wait({own, servers}, return_when=asyncio.FIRST_EXCEPTION)
            if not servers.done():
                # Our side failed. Who died is known at once; the others wait for us in vain.
                await asyncio.wait({servers}, timeout=_CAUSE_S)
                self._break_off()
            await servers
            await own
        except RuntimeError as error:
            raise ServerError(f"sending weights to the servers broke off: {error}.") from error
        finally:
            servers.cancel()

    def _begin_to_send(self, outgoing: Outgoing) -> Future[None]:
        """This rank's part of a sync, on a thread."""
        gatherer, group = outgoing.gatherer, self._group
        lanes = Lanes(gatherer.dtype, self._world.device)

        def begin(lane: int, deliveries: list[Delivery]) -> list[dist.P2POp]:
            cuts = [_cuts(gatherer, delivery, self._sources[delivery]) for delivery in deliveries]
            pieces, copies = lanes.take(lane, cuts)
            for part, place in copies:
                place.copy_(part)
            return [
                dist.P2POp(dist.isend, piece, group=group, group_peer=delivery.target)
                for piece, delivery in zip(pieces, deliveries, strict=True)
            ]

        def work() -> None:
            with on_device(self._world.device), torch.no_grad():
                in_rounds(self._sources, begin)
                if self._world.device.type == "cuda":
                    torch.cuda.synchronize()

        return in_background("weights", work)


def _cuts(gatherer: Gatherer, delivery: Delivery, sources: Sequence[Where]) -> list[torch.Tensor]:
    """A delivery's parts where they are on this rank."""
    cuts = []
    for part, (parameter, row, column) in zip(delivery.parts, sources, strict=True):
        own = gatherer.own(parameter)
        rows = own if own.dim() == 2 else own.view(-1, 1)
        cuts.append(rows.narrow(0, row, part.rows).narrow(1, column, part.columns))
    return cuts


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
