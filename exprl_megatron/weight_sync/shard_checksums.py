"""Checksums of the weights that servers should hold, computed from the trainer ranks' shards without joining them.

Each shard is cut to the parts of servers' parameters that are made of it. A part's hash is of its bytes and its place
(serving/part_hash.py), and a parameter's checksum is the sum of its parts' hashes, so that each rank adds up its own.
A server hashes the same parts of the parameters that its model holds (serving/model_checksums.py). Which parts a
parameter is made of follows from the names of tensors (serving/weight_layout.py), not from the server's loader.
"""

import asyncio
import secrets
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np
import torch
import xxhash

from exprl_megatron.errors import ServerError
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.name_map import Parameter, hf_shapes
from exprl_megatron.policy.gather import Gatherer
from exprl_megatron.policy.world import World
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.loader_commands import LOADER, RECORDS
from exprl_megatron.serving.model_checksums import Report, as_grid, cut, pack_expected, to_hex
from exprl_megatron.serving.part_hash import accumulate_hashes, hash_parts
from exprl_megatron.serving.process_groups import in_background, on_device
from exprl_megatron.serving.transfer_tables import RECTANGLE, Slice
from exprl_megatron.serving.weight_layout import PLUS_ONE, ServerParameters, served_dtype, server_parameters
from exprl_megatron.utils.authentication import NotAuthentic
from exprl_megatron.utils.keyed_store import Records
from exprl_megatron.utils.required import required
from exprl_megatron.utils.together import gather_or_cancel
from exprl_megatron.weight_sync.groups import address_towards, host_of, rendezvous_store
from exprl_megatron.weight_sync.p2p_schedule import shard_sources
from exprl_megatron.weight_sync.shard_table import ShardTable, shard_table


@dataclass(frozen=True)
class ChecksumPlan:
    """Which parts of servers' parameters `world`'s rank hashes."""

    servers: list[ServerParameters]
    """Of each rank of a server."""
    parts: list[np.ndarray]
    """RECTANGLE: all parts of their parameters."""
    held: ShardTable
    numbers: np.ndarray
    """int64 [own parts]: of the parameter, over all ranks of a server."""
    places: np.ndarray
    """RECTANGLE [own parts]: where each is in that parameter."""
    sources: np.ndarray
    """RECTANGLE [own parts]: where each is in this rank's parameters, sorted by these."""
    padding: np.ndarray
    """RECTANGLE: parts that are zero, of which rank 0 answers for all; `padding_numbers` as `numbers`."""
    padding_numbers: np.ndarray
    sigmoid_router: bool
    """Of the model; see served_dtype."""

    @cached_property
    def adds_one(self) -> np.ndarray:
        """bool [count]: which parameters are copies of norms with 1 added; see weight_layout.py."""
        return np.array([name.endswith(PLUS_ONE) for server in self.servers for name in server.shapes])

    @property
    def count(self) -> int:
        """Parameters of all ranks of a server."""
        return sum(len(server.shapes) for server in self.servers)


def plan_checksums(architecture: Architecture, world: World, server_tp: int) -> ChecksumPlan:
    """Return the plan of this rank. Copies of a shard share its parts."""
    layout, cuda = world.layout, world.device.type == "cuda"
    held = shard_table(architecture, layout, cuda)
    servers = server_parameters(
        hf_shapes(architecture),
        tp=server_tp,
        kv_heads=architecture.kv_groups,
        server="cuda" if cuda else "cpu",
        delta_net=architecture.delta_net,
    )
    every, numbers, places, sources, first = [], [], [], [], 0
    for server in servers:
        found = shard_sources(server.needs, held)
        placed = _placed(found.at_target, server.places)
        every.append(np.concatenate([placed, server.padding]))
        for group, holding in enumerate(found.holdings):
            if world.rank in holding:
                rows = found.rows(group)
                mine = slice(rows.start + holding.index(world.rank), rows.stop, len(holding))
                numbers.append(placed["of"][mine] + np.int64(first))
                places.append(placed[mine])
                sources.append(found.at_source[mine])
        first += len(server.shapes)
    source = np.concatenate([*sources, np.empty(0, RECTANGLE)])
    order = np.argsort(source["of"], kind="stable")
    firsts = np.cumsum([0, *(len(server.shapes) for server in servers[:-1])])
    return ChecksumPlan(
        servers=servers,
        parts=every,
        held=held,
        numbers=np.concatenate([*numbers, np.empty(0, np.int64)])[order],
        places=np.concatenate([*places, np.empty(0, RECTANGLE)])[order],
        sources=source[order],
        padding=np.concatenate([server.padding for server in servers]),
        padding_numbers=np.concatenate(
            [server.padding["of"] + start for server, start in zip(servers, firsts, strict=True)]
        ),
        sigmoid_router=architecture.experts is not None and architecture.experts.sigmoid,
    )


def own_sums(plan: ChecksumPlan, gatherer: Gatherer, world: World) -> np.ndarray:
    """Return uint64 [plan.count]: for each parameter the sum, modulo 2**64, of the hashes of this rank's parts."""
    sums = accumulate_hashes(plan.numbers, hash_parts(_own_parts(plan, gatherer)), plan.count)
    if world.rank == 0:
        zeros = (
            (Slice(*place), torch.zeros(place[2], place[4], dtype=gatherer.dtype, device=world.device))
            for place in plan.padding.tolist()
        )
        sums += accumulate_hashes(plan.padding_numbers, hash_parts(zeros), plan.count)
    return sums


def as_checksums(plan: ChecksumPlan, sums: Sequence[np.ndarray]) -> list[dict[str, str]]:
    """Add up the `sums` of all ranks, uint64 [plan.count] each.

    Returns, for each rank of a server, the checksums that `model_checksums.checksums` should find.
    """
    total = map(int, np.stack(sums).sum(axis=0, dtype=np.uint64))
    return [{name: to_hex(next(total)) for name in server.shapes} for server in plan.servers]


class ShardChecksums:
    """Both sides' checksums of one trainer's syncs. Every rank has one; rank 0 alone talks to servers."""

    def __init__(self, architecture: Architecture, world: World, server_tp: int, deadline_s: float):
        self._architecture = architecture
        self._world = world
        self._server_tp = server_tp
        self._deadline_s = deadline_s
        self._planning: Future[ChecksumPlan] | None = None
        self._store: Records | None = None
        self._expected: list[str] = []
        """Of each rank of a server the store's name of what its parameters are to be."""

    def begin(self, gatherer: Gatherer) -> Future[np.ndarray]:
        """Start to hash this rank's parts on a thread while the weights are sent; the result is that of `own_sums`:
        uint64 [count].
        """
        if self._planning is None:
            self._planning = in_background(
                "plan of checksums", lambda: plan_checksums(self._architecture, self._world, self._server_tp)
            )
        planning = self._planning

        def work() -> np.ndarray:
            with on_device(self._world.device), torch.no_grad():
                return own_sums(planning.result(), gatherer, self._world)

        return in_background("checksums", work)

    def expected(self, sums: Sequence[np.ndarray]) -> list[dict[str, str]]:
        """Return the checksums that each rank of a server should have, from all ranks' sums, uint64 [count] each; rank
        0 only.
        """
        return as_checksums(self._plan(), sums)

    async def held(self, clients: Sequence[SGLangClient], dtype: torch.dtype) -> list[tuple[dict[str, str], ...]]:
        """Return the checksums of each rank of each server; rank 0 only, after `begin`.

        Raises ServerError where one cannot say.
        """
        store = self._store
        if store is None:
            place = rendezvous_store(address_towards(host_of(clients[0].url)), self._deadline_s)
            store = self._store = Records(place, secrets.token_hex(16), RECORDS)
            await asyncio.to_thread(self._publish, store, str(dtype).removeprefix("torch."))
        return await gather_or_cancel(self._ask(client, store) for client in clients)

    def _plan(self) -> ChecksumPlan:
        return required(self._planning, "the plan that begin makes").result()

    def _publish(self, store: Records, dtype: str) -> None:
        plan = self._plan()
        for server, parts in zip(plan.servers, plan.parts, strict=True):
            dtypes = [served_dtype(name, dtype, plan.sigmoid_router) for name in server.shapes]
            packed = pack_expected(server.shapes, dtypes, parts)
            self._expected.append(f"expected {xxhash.xxh3_128_hexdigest(packed)}")
            store.set(self._expected[-1], packed)

    async def _ask(self, client: SGLangClient, store: Records) -> tuple[dict[str, str], ...]:
        answers = [f"checksums {uuid.uuid4().hex}" for _ in range(self._server_tp)]
        common = {
            "do": "checksums",
            "address": store.host,
            "port": store.port,
            "secret": store.key,
            "deadline_s": self._deadline_s,
        }
        commands = [
            common | {"expected": expected, "answer": answer}
            for expected, answer in zip(self._expected, answers, strict=True)
        ]
        await client.begin_weight_update(deadline_s=self._deadline_s)
        await client.update_from_tensor(
            commands, version=None, flush_cache=False, loader=LOADER, deadline_s=self._deadline_s
        )
        await client.end_weight_update(deadline_s=self._deadline_s)
        return tuple(self._reported(client, store, answer) for answer in answers)

    def _reported(self, client: SGLangClient, store: Records, answer: str) -> dict[str, str]:
        said = "it did not answer"
        if store.check([answer]):
            try:
                report = msgspec.msgpack.decode(store.get(answer), type=Report)
            except (msgspec.MsgspecError, NotAuthentic) as error:
                report = Report(error=f"its answer cannot be read ({error})")
            store.delete(answer)
            if not report.error:
                return report.checksums
            said = report.error
        raise ServerError(f"{client.name} ({client.url}) did not report its weights' checksums: {said}; see its log.")


def _own_parts(plan: ChecksumPlan, gatherer: Gatherer) -> Iterator[tuple[Slice, torch.Tensor]]:
    number, grid = -1, torch.empty(0)
    adds_one = plan.adds_one[plan.numbers].tolist()
    for place, source, plus_one in zip(plan.places.tolist(), plan.sources.tolist(), adds_one, strict=True):
        if source[0] != number:
            number, grid = source[0], as_grid(_as_served(plan, gatherer, plan.held.parameters[source[0]]))
        part = cut(grid, Slice(*source))
        yield Slice(*place), part + 1 if plus_one else part


def _placed(wanted: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return the parts of needs, as parts of the parameters that these are in."""
    placed = wanted.copy()
    within = places[wanted["of"]]
    placed["of"] = within["of"]
    placed["row"] += within["row"]
    placed["column"] += within["column"]
    return placed


def _as_served(plan: ChecksumPlan, gatherer: Gatherer, parameter: Parameter) -> torch.Tensor:
    """Return this rank's shard in the dtype in which servers keep its tensors."""
    own = gatherer.own(parameter)
    kind = served_dtype(parameter.hf_names[0], str(own.dtype).removeprefix("torch."), plan.sigmoid_router)
    return own.to(getattr(torch, kind))
