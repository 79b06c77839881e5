"""Weights from each trainer rank's shard straight into the servers' parameters, by point-to-point messages.

Nothing is joined and nothing is sent twice: a server's rank is sent what it holds, by the ranks that have it, in one
group of all trainer and server ranks (gloo between CPU processes, NCCL between GPUs). What it holds, each server's rank
finds out from its own model (serving/loader_trace.py).
"""

import asyncio
import json
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import Future
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from exprl_megatron.errors import ServerError, UserError
from exprl_megatron.models.name_map import dtype_of
from exprl_megatron.models.shards import Shape, in_words
from exprl_megatron.policy.world import World
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.loader_commands import ABORTED, LOADER, NOT_FOLLOWED, RECORDS
from exprl_megatron.serving.process_groups import abort, destroy, in_background, on_device
from exprl_megatron.serving.transfer_tables import pack_transfers, unpack_needs
from exprl_megatron.utils.accelerator import group_backend
from exprl_megatron.utils.authentication import NotAuthentic
from exprl_megatron.utils.keyed_store import Records
from exprl_megatron.utils.together import gather_or_cancel
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.groups import (
    address_towards,
    break_off,
    follow_destroy,
    group_name,
    meet,
    meeting_place,
    timeout_s,
)
from exprl_megatron.weight_sync.outgoing import Outgoing
from exprl_megatron.weight_sync.p2p_schedule import TransferPlan
from exprl_megatron.weight_sync.p2p_sender import P2PSender
from exprl_megatron.weight_sync.shard_table import shard_table
from exprl_megatron.weight_sync.timing import SyncTimes

_CAUSE_S = 5.0


class CannotReceive(UserError):
    """A server is well, but cannot be sent shards: it has another loader, or one that cannot be followed."""


class DirectTransport:
    """See Transport. `server_tp` is the tensor parallelism of each server; `clients` are needed on rank 0 alone."""

    fillers = None

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
        self._store: Records | None = None
        """In which all members meet; the servers have its key from their commands."""
        self._name = ""
        self._size = 0
        """Of the group."""
        self._group: dist.ProcessGroup | None = None
        self._sending: P2PSender | None = None
        """Once it is planned."""
        self._moved = 0
        """Bytes to one server."""
        self._commands = 0

    def connect(self, clients: Sequence[SGLangClient]) -> None:
        self._break_off()
        self._clients = list(clients)

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._world.device)

    async def push(self, outgoing: Outgoing, version: str, times: SyncTimes) -> None:
        try:
            with self._coordinator.abort_on_error():
                await gather_or_cancel(
                    client.begin_weight_update(deadline_s=self._deadline_s) for client in self._clients
                )
                if self._group is None:
                    await self._open(outgoing)
                started = time.monotonic()
                self._coordinator.signal()
                await self._send(outgoing)
                sent_s = time.monotonic()
                await self._command("finish", version=version)
                await gather_or_cancel(
                    client.end_weight_update(deadline_s=self._deadline_s) for client in self._clients
                )
                self._coordinator.signal()
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
            self._coordinator.wait_signal()
            sending = self._begin_to_send(outgoing)
            self._coordinator.wait_signal()
            sending.result()
        except BaseException:
            self._break_off()
            raise

    async def close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            try:
                with self._coordinator.abort_on_error():
                    await gather_or_cancel(
                        client.begin_weight_update(deadline_s=self._deadline_s) for client in self._clients
                    )
                    # NCCL may wait for all members of a group before one of them has given it up.
                    await gather_or_cancel(
                        [self._command("leave"), asyncio.to_thread(destroy, group, self._deadline_s)]
                    )
                    await gather_or_cancel(
                        client.end_weight_update(deadline_s=self._deadline_s) for client in self._clients
                    )
                    self._coordinator.signal()
            except ServerError:
                abort(group)
                raise
        self._store = None

    def follow_close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            follow_destroy(group, self._coordinator, self._deadline_s)

    def _break_off(self) -> None:
        """Let servers go that wait for what is not sent any more, or for the others in a group that does not form."""
        group, self._group = self._group, None
        if self._store is not None:
            self._store.set(ABORTED, "")
        if group is not None:
            break_off(group, self._world.rank, self._size)
        self._store = None

    async def _open(self, outgoing: Outgoing) -> None:
        """All ranks and servers meet in a new group; everyone learns what the servers hold."""
        for client in self._clients:
            if LOADER not in await client.loaders():
                raise CannotReceive(
                    f"{client.name} ({client.url}) was started without --custom-weight-loader {LOADER}, which "
                    f"sync.transport direct needs; start it with exprl serve, or use broadcast."
                )
        address = address_towards(urlsplit(self._clients[0].url).hostname)
        self._store = Records(meeting_place(address, self._deadline_s), secrets.token_hex(16), RECORDS)
        gatherer = outgoing.gatherer
        word = _word(gatherer.dtype)
        others = {name: kind for name in gatherer.shapes if (kind := dtype_of(name, word)) != word}
        told = {"dtype": word, "shapes": gatherer.shapes, "dtypes": others}
        self._store.set("tensors", json.dumps(told))
        self._name = group_name(self._store.key)
        self._size = self._world.layout.world_size + self._server_tp * len(self._clients)
        self._coordinator.signal((self._name, self._size, address, self._store.port))
        meeting = asyncio.wrap_future(self._meet(address, self._store.port))
        await self._join(meeting)
        packed, alike = self._reported(in_words(gatherer.shapes, word))
        self._coordinator.signal((packed, alike))
        self._group = meeting.result()
        plan = await asyncio.to_thread(self._plan, outgoing, packed, alike)
        await asyncio.to_thread(_publish, plan, self._store)
        self._keep(plan)

    def _reported(self, shapes: dict[str, Shape]) -> tuple[list[bytes], list[list[int]]]:
        """What server ranks reported that they hold, of ranks that are alike once; which of that each server's did."""
        numbers: dict[bytes, int] = {}
        alike: list[list[int]] = []
        for server, client in enumerate(self._clients):
            alike.append([])
            for rank in self._ranks(server):
                try:
                    packed = self._store.get(f"needs/{rank}")
                    if packed not in numbers:
                        unpack_needs(packed, shapes)
                except ValueError as error:
                    raise ServerError(f"{client.name} ({client.url}) did not report what it holds: {error}.") from error
                alike[-1].append(numbers.setdefault(packed, len(numbers)))
        return list(numbers), alike

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
        self._name, self._size, address, port = self._coordinator.wait_signal()
        meeting = self._meet(address, port)
        packed, alike = self._coordinator.wait_signal()
        self._group = meeting.result(self._deadline_s)
        self._keep(self._plan(outgoing, packed, alike))

    def _meet(self, address: str, port: int) -> Future[dist.ProcessGroup]:
        """Begin to form the group of all ranks and servers."""

        def work() -> dist.ProcessGroup:
            with on_device(self._world.device):
                group = meet(self._name, address, port, self._world.rank, self._size, self._deadline_s)
                # NCCL wants every member in the first thing that a group does.
                dist.all_reduce(torch.zeros(1, device=self._world.device), group=group)
                return group

        return in_background(self._name, work)

    def _plan(self, outgoing: Outgoing, packed: list[bytes], alike: list[list[int]]) -> TransferPlan:
        """Who sends what; the arguments are as `_reported` returns them."""
        gatherer, layout = outgoing.gatherer, self._world.layout
        word = _word(gatherer.dtype)
        shapes = in_words(gatherer.shapes, word)
        tables = [unpack_needs(table, shapes) for table in packed]
        needs = [[tables[which] for which in server] for server in alike]
        held = shard_table(outgoing.architecture, layout, self._world.device.type == "cuda", word)
        return TransferPlan(needs, held, layout, word, outgoing.bucket_bytes)

    def _keep(self, plan: TransferPlan) -> None:
        self._sending = P2PSender(plan, self._world)
        self._moved = plan.nbytes // len(self._clients) if self._coordinator.is_rank0 else 0

    def _ranks(self, server: int) -> range:
        """A server's ranks in the group."""
        first = self._world.layout.world_size + server * self._server_tp
        return range(first, first + self._server_tp)

    async def _command(self, what: str, version: str | None = None) -> None:
        """All servers to do something (see serving/loader.py). Raises ServerError with what one could not."""
        self._commands += 1
        await gather_or_cancel(self._command_one(what, server, version) for server in range(len(self._clients)))

    async def _command_one(self, what: str, server: int, version: str | None) -> None:
        client = self._clients[server]
        command = {
            "do": what,
            "answer": f"answer {self._commands}",
            "group": self._name,
            "secret": self._store.key,
            "backend": group_backend(),
            "address": self._store.host,
            "port": self._store.port,
            "world_size": self._size,
            "deadline_s": self._deadline_s,
            "timeout_s": timeout_s(self._deadline_s),
        }
        await client.update_from_tensor(
            [command | {"rank": rank} for rank in self._ranks(server)],
            version=version,
            flush_cache=version is not None,
            loader=LOADER,
            deadline_s=self._deadline_s,
        )
        for rank in self._ranks(server):
            said = self._said(f"{command['answer']}/{rank}")
            if NOT_FOLLOWED in said:
                raise CannotReceive(f"{client.name} ({client.url}) could not {what} weights: {said}.")
            if said:
                raise ServerError(f"{client.name} ({client.url}) could not {what} weights: {said}; see its log.")

    def _said(self, answer: str) -> str:
        """A server's rank's answer to an command; "" is well."""
        if self._store is None:
            return "the group was broken off"
        try:
            return self._store.get(answer).decode() if self._store.check([answer]) else "it did not answer"
        except NotAuthentic as error:
            return str(error)

    async def _send(self, outgoing: Outgoing) -> None:
        await self._both(asyncio.wrap_future(self._begin_to_send(outgoing)), "receive")

    async def _both(self, own: asyncio.Future, what: str) -> None:
        """Return when our side and the servers are through. What a server says is the cause, where both fail."""
        servers = asyncio.ensure_future(self._command(what))
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
        return self._sending.begin(outgoing.gatherer, self._group)


def _publish(plan: TransferPlan, store: Records) -> None:
    """Tells each server rank what it is going to receive."""
    for rank in plan.targets:
        store.set(f"transfers/{rank}", pack_transfers(plan.receives(rank)))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
