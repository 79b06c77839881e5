"""Weight sync by direct transfers (point-to-point): from the trainer ranks' shards into the servers' parameters.

No tensor is gathered and nothing is sent twice: a server's rank receives the slices that it holds from the ranks that
have them, in one group of all trainer and server ranks (gloo between CPU processes, NCCL between GPUs). Each server's
rank traces its own loader to determine these slices (serving/loader_trace.py).
"""

import asyncio
import json
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import Future

import torch
import torch.distributed as dist

from exprl_megatron.errors import ServerError, UserError
from exprl_megatron.models.name_map import dtype_of
from exprl_megatron.models.shards import Shape, shapes_in_words
from exprl_megatron.policy.world import World
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.loader_commands import ABORTED, LOADER, NOT_FOLLOWED, RECORDS
from exprl_megatron.serving.process_groups import abort, destroy, in_background, on_device
from exprl_megatron.serving.transfer_tables import pack_transfers, unpack_needs
from exprl_megatron.utils.accelerator import group_backend
from exprl_megatron.utils.authentication import NotAuthentic
from exprl_megatron.utils.keyed_store import Records
from exprl_megatron.utils.required import required
from exprl_megatron.utils.together import gather_or_cancel
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.groups import (
    abort_group,
    address_towards,
    follow_destroy,
    group_name,
    host_of,
    init_group,
    rendezvous_store,
    timeout_s,
)
from exprl_megatron.weight_sync.memory_transport import MemoryTransport
from exprl_megatron.weight_sync.p2p_schedule import TransferPlan
from exprl_megatron.weight_sync.p2p_sender import P2PSender
from exprl_megatron.weight_sync.shard_table import shard_table
from exprl_megatron.weight_sync.timing import SyncTimes
from exprl_megatron.weight_sync.weight_exporter import WeightExporter

_CAUSE_S = 5.0


class CannotReceive(UserError):
    """A healthy server cannot receive shards: it has another loader, or one that cannot be traced."""


class DirectTransport(MemoryTransport):
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
        self._store: Records | None = None
        """The store in which all members meet; its key is in the commands to the servers."""
        self._name = ""
        self._size = 0
        """Number of members of the group."""
        self._group: dist.ProcessGroup | None = None
        self._sending: P2PSender | None = None
        """None until the transfers are planned."""
        self._moved = 0
        """Bytes to one server."""
        self._commands = 0

    def connect(self, clients: Sequence[SGLangClient]) -> None:
        """Push weights to these servers from now on; releases what was shared with the former ones. A collective."""
        self._abort()
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
                if self._group is None:
                    await self._open(exporter)
                started = time.monotonic()
                self._coordinator.signal()
                await self._send(exporter)
                sent_s = time.monotonic()
                await self._command("finish", version=version)
                await gather_or_cancel(
                    client.end_weight_update(deadline_s=self._deadline_s) for client in self._clients
                )
                self._coordinator.signal()
        except BaseException:
            self._abort()
            raise
        times.send_s += sent_s - started
        times.load_s += time.monotonic() - sent_s
        times.moved += self._moved

    def follow(self, exporter: WeightExporter) -> None:
        """Take part in `push` on the other ranks.

        Raises:
            RankZeroFailed: rank 0 has an error.
        """
        try:
            if self._group is None:
                self._follow_open(exporter)
            self._coordinator.wait_signal()
            sending = self._begin_to_send(exporter)
            self._coordinator.wait_signal()
            sending.result()
        except BaseException:
            self._abort()
            raise

    async def close(self) -> None:
        """Release everything on the servers except the weights; rank 0 only."""
        group, self._group = self._group, None
        if group is not None:
            try:
                with self._coordinator.abort_on_error():
                    await gather_or_cancel(
                        client.begin_weight_update(deadline_s=self._deadline_s) for client in self._clients
                    )
                    # NCCL may wait until all members of a group destroy it.
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
        """Take part in `close` on the other ranks."""
        group, self._group = self._group, None
        if group is not None:
            follow_destroy(group, self._coordinator, self._deadline_s)

    def _abort(self) -> None:
        """Abort the group, so that no server waits for transfers that will not be sent, or for members that do not
        join."""
        group, self._group = self._group, None
        if self._store is not None:
            self._store.set(ABORTED, "")
        if group is not None:
            abort_group(group, self._world.rank, self._size)
        self._store = None

    async def _open(self, exporter: WeightExporter) -> None:
        """Form a new group of all ranks and servers; every rank learns which slices the servers need."""
        for client in self._clients:
            if LOADER not in await client.loaders():
                raise CannotReceive(
                    f"{client.name} ({client.url}) was started without --custom-weight-loader {LOADER}, which "
                    f"sync.transport direct needs; start it with exprl serve, or use broadcast."
                )
        address = address_towards(host_of(self._clients[0].url))
        self._store = Records(rendezvous_store(address, self._deadline_s), secrets.token_hex(16), RECORDS)
        gatherer = exporter.gatherer
        word = _dtype_name(gatherer.dtype)
        others = {name: kind for name in gatherer.shapes if (kind := dtype_of(name, word)) != word}
        tensors = {"dtype": word, "shapes": gatherer.shapes, "dtypes": others}
        self._store.set("tensors", json.dumps(tensors))
        self._name = group_name(self._store.key)
        self._size = self._world.layout.world_size + self._server_tp * len(self._clients)
        self._coordinator.signal((self._name, self._size, address, self._store.port))
        meeting = asyncio.wrap_future(self._init_group(address, self._store.port))
        await self._join(meeting)
        packed, alike = self._reported(shapes_in_words(gatherer.shapes, word))
        self._coordinator.signal((packed, alike))
        self._group = meeting.result()
        plan = await asyncio.to_thread(self._plan, exporter, packed, alike)
        await asyncio.to_thread(_publish, plan, self._store)
        self._keep(plan)

    def _reported(self, shapes: dict[str, Shape]) -> tuple[list[bytes], list[list[int]]]:
        """Return the distinct tables of slices that server ranks need, and the index of each server rank's table."""
        store = required(self._store, "the store of the group")
        numbers: dict[bytes, int] = {}
        alike: list[list[int]] = []
        for server, client in enumerate(self._clients):
            alike.append([])
            for rank in self._ranks(server):
                try:
                    packed = store.get(f"needs/{rank}")
                    if packed not in numbers:
                        unpack_needs(packed, shapes)
                except ValueError as error:
                    raise ServerError(
                        f"{client.name} ({client.url}) did not report which slices it needs: {error}."
                    ) from error
                alike[-1].append(numbers.setdefault(packed, len(numbers)))
        return list(numbers), alike

    async def _join(self, meeting: asyncio.Future) -> None:
        """Wait until all are members. Raises ServerError naming the servers that did not join within the deadline."""
        started = time.monotonic()
        try:
            await self._both(meeting, "join")
        except ServerError as error:
            absent = self._absent() if time.monotonic() - started >= self._deadline_s else []
            if not absent:
                raise
            raise ServerError(
                f"{', '.join(absent)} did not join the weights group within sync.deadline_s "
                f"({self._deadline_s:g} s); see the servers' logs."
            ) from error

    def _absent(self) -> list[str]:
        """Return the servers with a rank that has not reported its slices, as each does before it joins."""
        return [
            f"{client.name} ({client.url})"
            for server, client in enumerate(self._clients)
            if self._store is not None and not self._store.check([f"needs/{rank}" for rank in self._ranks(server)])
        ]

    def _follow_open(self, exporter: WeightExporter) -> None:
        self._name, self._size, address, port = self._coordinator.wait_signal()
        meeting = self._init_group(address, port)
        packed, alike = self._coordinator.wait_signal()
        self._group = meeting.result(self._deadline_s)
        self._keep(self._plan(exporter, packed, alike))

    def _init_group(self, address: str, port: int) -> Future[dist.ProcessGroup]:
        """Start to form the group of all ranks and servers."""

        def work() -> dist.ProcessGroup:
            with on_device(self._world.device):
                group = init_group(self._name, address, port, self._world.rank, self._size, self._deadline_s)
                # NCCL connects a group in its first operation, which needs every member.
                dist.all_reduce(torch.zeros(1, device=self._world.device), group=group)
                return group

        return in_background(self._name, work)

    def _plan(self, exporter: WeightExporter, packed: list[bytes], alike: list[list[int]]) -> TransferPlan:
        """Plan the transfers; the arguments are as `_reported` returns them."""
        gatherer, layout = exporter.gatherer, self._world.layout
        word = _dtype_name(gatherer.dtype)
        shapes = shapes_in_words(gatherer.shapes, word)
        tables = [unpack_needs(table, shapes) for table in packed]
        needs = [[tables[which] for which in server] for server in alike]
        held = shard_table(exporter.architecture, layout, self._world.device.type == "cuda", word)
        return TransferPlan(needs, held, layout, word, exporter.bucket_bytes)

    def _keep(self, plan: TransferPlan) -> None:
        self._sending = P2PSender(plan, self._world)
        self._moved = plan.nbytes // len(self._clients) if self._coordinator.is_rank0 else 0

    def _ranks(self, server: int) -> range:
        """Return a server's rank numbers in the group."""
        first = self._world.layout.world_size + server * self._server_tp
        return range(first, first + self._server_tp)

    async def _command(self, what: str, version: str | None = None) -> None:
        """Send a command to all servers (see serving/loader.py). Raises ServerError where one fails."""
        self._commands += 1
        await gather_or_cancel(self._command_one(what, server, version) for server in range(len(self._clients)))

    async def _command_one(self, what: str, server: int, version: str | None) -> None:
        client, store = self._clients[server], required(self._store, "the store of the group")
        command = {
            "do": what,
            "answer": f"answer {self._commands}",
            "group": self._name,
            "secret": store.key,
            "backend": group_backend(),
            "address": store.host,
            "port": store.port,
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
        """Return a server rank's answer to a command; "" means success."""
        if self._store is None:
            return "the group was aborted"
        try:
            return self._store.get(answer).decode() if self._store.check([answer]) else "it did not answer"
        except NotAuthentic as error:
            return str(error)

    async def _send(self, exporter: WeightExporter) -> None:
        await self._both(asyncio.wrap_future(self._begin_to_send(exporter)), "receive")

    async def _both(self, own: asyncio.Future, what: str) -> None:
        """Wait until this side and the servers are done. Where both fail, the servers' error is the cause."""
        servers = asyncio.ensure_future(self._command(what))
        # Its result may never be read.
        own.add_done_callback(lambda future: future.cancelled() or future.exception())
        try:
            await asyncio.wait({own, servers}, return_when=asyncio.FIRST_EXCEPTION)
            if not servers.done():
                # This side failed. A dead server is known immediately; the others wait for transfers that will not
                # come.
                await asyncio.wait({servers}, timeout=_CAUSE_S)
                self._abort()
            await servers
            await own
        except RuntimeError as error:
            raise ServerError(f"sending weights to the servers failed: {error}.") from error
        finally:
            servers.cancel()

    def _begin_to_send(self, exporter: WeightExporter) -> Future[None]:
        """Start this rank's part of a sync, on a thread."""
        sender = required(self._sending, "the plan of transfers")
        return sender.begin(exporter.gatherer, required(self._group, "the group of ranks and servers"))


def _publish(plan: TransferPlan, store: Records) -> None:
    """Write to the store which transfers each server rank will receive."""
    for rank in plan.targets:
        store.set(f"transfers/{rank}", pack_transfers(plan.receives(rank)))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
