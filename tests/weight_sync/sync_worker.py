"""Run by test_syncs.py on four processes: syncs from many layouts to running servers, and what a refusal does."""

import asyncio
import os
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import psutil
import torch
import torch.distributed as dist
from helpers.ranks import Ranks

from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.config.serving import SyncConfig
from exprl_megatron.config.transport import TransportChoice
from exprl_megatron.errors import ServerError
from exprl_megatron.policy.policy import Policy
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.keys import authorization
from exprl_megatron.serving.static_pool import StaticPool
from exprl_megatron.utils.accelerator import GROUP_BACKEND
from exprl_megatron.weight_sync.auto import AutoTransport
from exprl_megatron.weight_sync.broadcast import BroadcastTransport
from exprl_megatron.weight_sync.coordinator import RankCoordinator, RankZeroFailed
from exprl_megatron.weight_sync.direct import DirectTransport
from exprl_megatron.weight_sync.handles import HandlesTransport, _serialized
from exprl_megatron.weight_sync.p2p_sender import P2PSender
from exprl_megatron.weight_sync.rounds import push_rounds
from exprl_megatron.weight_sync.sync import WeightSync
from exprl_megatron.weight_sync.transports import make_transport
from exprl_megatron.weight_sync.weight_exporter import WeightExporter

LAYOUTS = {
    "TP1": Layout(),
    "TP2": Layout(tp=2),
    "PP2": Layout(pp=2),
    "VPP2xDP2": Layout(pp=2, vpp=2, dp=2),
    "TP2xPP2": Layout(tp=2, pp=2),
}
TRANSPORTS = {"broadcast": BroadcastTransport, "direct": DirectTransport, "handles": HandlesTransport}
TOLD: list[str] = []
"""What the transports that choose for themselves said."""
UNDER_NCCL = ("TP1", "PP2", "TP2xPP2")
BUCKET_MB = 0.04
WRONG_BY = ("broadcast", "direct", "handles", "disk", "delta")
CHANGED = "model.layers.2.self_attn.o_proj.weight"
HANDED_OVER = ((Layout(tp=2), "tp2"), (Layout(tp=2, pp=2), "tp2"), (Layout(pp=2), "two"), (Layout(), "tp2"))


def over_nccl_like():
    """Worlds that are made in here go over the test backend with NCCL's behavior."""
    return patch.dict(os.environ, {GROUP_BACKEND: "nccl_like"})


class Syncs:
    """Syncs from one world to one set of servers."""

    def __init__(self, world, model: str, servers: list[dict], tp: int):
        self.policy = Policy(PolicyConfig(model=model, layout=world.layout), seed=0)
        self.coordinator = RankCoordinator(120.0)
        self.clients = [client_of(server) for server in servers] if world.rank == 0 else []
        self.tp = tp
        for client in self.clients:
            self.coordinator.run(client.__aenter__())

    def sync(self, kind: str, **settings) -> WeightSync:
        made = TRANSPORTS.get(kind) or partial(AutoTransport, log=TOLD.append)
        transport = made(self.clients, self.tp, self.policy.world, self.coordinator, 60.0)
        config = SyncConfig(bucket_mb=BUCKET_MB, **settings)
        return WeightSync(config, self.policy, self.coordinator, StaticPool(self.clients), transport, self.tp)

    def by(self, transport) -> WeightSync:
        config = SyncConfig(bucket_mb=BUCKET_MB)
        members = StaticPool(self.clients)
        return WeightSync(config, self.policy, self.coordinator, members, transport, self.tp)

    def close(self, *syncs: WeightSync) -> None:
        for sync in syncs:
            sync.close()
        if self.coordinator.is_rank0:
            for client in self.clients:
                self.coordinator.run(client.__aexit__())
        self.coordinator.close()


def client_of(server: dict) -> SGLangClient:
    headers = authorization(server["key_file"])
    client = SGLangClient(server["url"], server["name"], deadline_s=100.0, headers=headers)
    client.first_gpu = server["first_gpu"]
    return client


def change(policy: Policy) -> None:
    """Other weights than the last sync sent, the same on all ranks that hold a copy."""
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            parameter.data.mul_(-1.0)


def bring_all(world, arguments, target: str) -> dict:
    """One sync by each transport; each is verified by checksums and raises where they differ."""
    servers, tp = arguments["targets"][target]
    syncs = Syncs(world, arguments["model"], servers, tp)
    made, measured = [], {}
    for kind in TRANSPORTS:
        made.append(syncs.sync(kind))
        change(syncs.policy)
        measured[kind] = made[-1].push_weights(f"{kind}-{world.layout}")
        assert made[-1].push_weights(f"{kind}-{world.layout}") == {}
    # The groups of the first stand still: a second sync goes through the same ones.
    change(syncs.policy)
    measured["again"] = made[0].push_weights("again")
    syncs.close(*made)
    return measured


def wrong_bytes(world, arguments, target: str, kind: str, directory: Path) -> list | None:
    """A sync in which a byte changes on its way, and one in which all goes well: how each ends on every rank."""
    servers, tp = arguments["targets"][target]
    syncs = Syncs(world, arguments["model"], servers, tp)
    transport = make_transport(
        TransportChoice(kind, ""),
        syncs.clients,
        tp,
        syncs.policy.world,
        syncs.coordinator,
        60.0,
        directory=directory / kind,
        model=Path(arguments["model"]),
    )
    sync, ends = syncs.by(transport), []
    with wrong_in_shards() if kind == "direct" else wrong_in_messages():
        ends.append(end_of(sync, f"{kind} wrong"))
    ends.append(end_of(sync, f"{kind} right"))
    syncs.close(sync)
    return syncs.coordinator.collect(ends)


def wrong_after_loading(world, arguments, target: str) -> list | None:
    """A byte changes in the server's model after it was loaded."""
    servers, tp = arguments["targets"][target]
    syncs = Syncs(world, arguments["model"], servers, tp)
    sync = syncs.sync("broadcast")
    push = sync._transport.push

    async def push_and_change(*sent):
        await push(*sent)
        shape = sync._exporter(None).gatherer.shapes["model.norm.weight"]
        filled = SimpleNamespace(named=lambda: [("model.norm.weight", torch.full(shape, 7.0))])
        for client in syncs.clients:
            await client.begin_weight_update()
            await client.update_from_tensor([_serialized(filled)] * tp, version=None, flush_cache=False)
            await client.end_weight_update()

    with patch.object(sync._transport, "push", push_and_change):
        ends = [end_of(sync, "changed")]
    syncs.close(sync)
    return syncs.coordinator.collect(ends)


def end_of(sync: WeightSync, version: str) -> str:
    try:
        sync.push_weights(version)
    except (ServerError, RankZeroFailed) as error:
        return f"{type(error).__name__}: {error}"
    return "well"


def wrong_in_messages():
    """One byte of CHANGED changes on every rank between its message and what reads that."""
    gather = WeightExporter.gather

    def changed(self, number: int):
        filled = gather(self, number)
        for name, tensor in filled.named() if filled is not None else ():
            if name == CHANGED:
                tensor.view(-1).view(torch.uint8)[5] ^= 1
        return filled

    return patch.object(WeightExporter, "gather", changed)


def wrong_in_shards():
    """One byte of CHANGED's parameter changes in what a rank sends of it."""
    cuts = P2PSender._cuts

    def changed(self, gatherer, transfer):
        found = cuts(self, gatherer, transfer)
        for place, part in enumerate(transfer.parts):
            if CHANGED in self._parameters[part.of].hf_names:
                found[place] = found[place].clone()
                found[place].view(-1).view(torch.uint8)[5] ^= 1
        return found

    return patch.object(P2PSender, "_cuts", changed)


def stopped_at(world, fails: int, count: int = 4) -> dict:
    """Rounds whose `fails`-th send is refused: how each rank ends, and after how many seconds."""
    coordinator = RankCoordinator(60.0)
    started = time.monotonic()

    async def send(number: int, _) -> None:
        if number == fails:
            raise ServerError("refused")

    def follow() -> None:
        for _ in range(count):
            coordinator.wait_signal()
        coordinator.wait_signal()

    ended = "well"
    try:
        if coordinator.is_rank0:
            asyncio.run(push_rounds(count, coordinator, [], lambda number: None, send, 60.0))
        else:
            follow()
    except (ServerError, RankZeroFailed) as error:
        ended = type(error).__name__
    ends = coordinator.collect((ended, time.monotonic() - started))
    return {"ends": [end for end, _ in ends or []], "seconds": max(s for _, s in ends or [("", 0.0)])}


def handed_over(world, arguments, target: str) -> list[int] | None:
    """How many handles each rank gives away in a round of a sync by `handles`."""
    servers, tp = arguments["targets"][target]
    syncs, given = Syncs(world, arguments["model"], servers, tp), []
    sync = syncs.sync("handles")
    change(syncs.policy)
    with patch("exprl_megatron.weight_sync.handles._serialized", lambda filled: given.append(1) or _serialized(filled)):
        sync.push_weights(f"handed over to {target}")
    rounds = len(sync._exporter(None).rounds)
    syncs.close(sync)
    return syncs.coordinator.collect(len(given) / rounds)


def falls_back(world, arguments) -> list[str] | None:
    """Two syncs to servers that refuse shards, verified by checksums: what rank 0 says meanwhile."""
    servers, tp = arguments["targets"]["two"]
    syncs = Syncs(world, arguments["model"], servers, tp)
    sync = syncs.sync("auto")
    modules = ("weight_sync.direct", "weight_sync.sync")
    with ExitStack() as patched:
        for module in modules:
            patched.enter_context(patch(f"exprl_megatron.{module}.LOADER", "another.loader"))
        for version in ("f1", "f2"):
            change(syncs.policy)
            sync.push_weights(version)
    syncs.close(sync)
    return TOLD


def refused(world, arguments) -> list[str] | None:
    """The server is asked to receive in a group that it is not in, for the second stage of a second sync."""
    servers, tp = arguments["targets"]["sacrificed"]
    syncs = Syncs(world, arguments["model"], servers, tp)
    sync = syncs.sync("broadcast")
    sync.push_weights("v1")
    ended = "well"
    sync._transport._groups.names[1] = "another"
    try:
        sync.push_weights("v2")
    except (ServerError, RankZeroFailed) as error:
        ended = f"{type(error).__name__}: {error}"
    if syncs.coordinator.is_rank0:
        syncs.coordinator.run(syncs.clients[0].__aexit__())
    syncs.coordinator.close()
    return syncs.coordinator.collect(ended)


def dies(world, arguments, kind: str, target: str) -> list | None:
    """The last server dies as the second sync comes to it: how each rank ends, and how soon the others are free.

    One of the others gets the third version then.
    """
    servers, tp = arguments["targets"][target]
    syncs = Syncs(world, arguments["model"], servers, tp)
    sync = syncs.sync(kind)
    sync.push_weights("v1")
    owner, name = (sync._transport, "_command") if kind == "direct" else (sync._transport._groups, "ask")
    asking = getattr(owner, name)

    async def after_a_death(*command, **settings):
        for process in psutil.Process(servers[-1]["pid"]).children(recursive=True):
            process.kill()
        return await asking(*command, **settings)

    ended, started = "well", time.monotonic()
    with patch.object(owner, name, after_a_death):
        try:
            sync.push_weights("v2")
        except (ServerError, RankZeroFailed) as error:
            ended = f"{type(error).__name__}: {error}"
    took_s = time.monotonic() - started
    syncs.clients = syncs.clients[:-1]
    if len(servers) > 1:
        if syncs.coordinator.is_rank0:
            syncs.coordinator.run(syncs.clients[0].reset(deadline_s=60.0))
        change(syncs.policy)
        sync = syncs.sync(kind)
        sync.push_weights("v3")
        syncs.close(sync)
    return syncs.coordinator.collect((ended, took_s))


def filled_twice(world, arguments) -> bool:
    """Whether ranks that fill every message, or are handed it, hold the same bytes, those of the model's one copy."""
    policy = Policy(PolicyConfig(model=arguments["model"], layout=world.layout), seed=0)
    exporter = WeightExporter(policy.chunks, policy.architecture, world, 40_000, source_ranks=((0,), (3, 2)))
    same = True
    for number in range(len(exporter.rounds)):
        filled = exporter.gather(number)
        size = sum(message.nbytes for message in exporter.rounds[number])
        data = torch.zeros(size, dtype=torch.uint8) if filled is None else filled.data.clone()
        copies = [torch.empty_like(data) for _ in range(4)]
        dist.all_gather(copies, data)
        same &= torch.equal(copies[0], copies[3]) and torch.equal(copies[0], copies[2])
        same &= bool(copies[0].any()) and not copies[1].any()
    return same


def main() -> None:
    ranks = Ranks()
    for name, layout in LAYOUTS.items():
        for target in ("two", "tp2"):
            ranks.within(layout, lambda w, t=target: bring_all(w, ranks.arguments, t), f"{name} to {target}")
    with over_nccl_like():
        for name in UNDER_NCCL:
            for target in ("two", "tp2"):
                run = f"{name} to {target} under NCCL's rules"
                ranks.within(LAYOUTS[name], lambda w, t=target: bring_all(w, ranks.arguments, t), run)
    for layout, target in HANDED_OVER:
        ranks.within(layout, lambda w, t=target: handed_over(w, ranks.arguments, t), f"{layout} hands to {target}")
    for fails in range(4):
        ranks.within(Layout(dp=2), lambda w, f=fails: stopped_at(w, f), f"stopped at {fails}")
    for kind in WRONG_BY:
        ranks.within(
            Layout(tp=2), lambda w, k=kind: wrong_bytes(w, ranks.arguments, "first", k, ranks.out), f"wrong by {kind}"
        )
    ranks.within(Layout(tp=2), lambda w: wrong_after_loading(w, ranks.arguments, "tp2"), "wrong after loading")
    ranks.within(Layout(tp=2, pp=2), lambda w: filled_twice(w, ranks.arguments), "filled twice")
    with over_nccl_like():
        ranks.within(Layout(tp=2, pp=2), lambda w: falls_back(w, ranks.arguments), "falls back")
        ranks.within(Layout(pp=2), lambda w: refused(w, ranks.arguments), "refused")
        ranks.within(Layout(pp=2), lambda w: dies(w, ranks.arguments, "direct", "two"), "direct dies")
        ranks.within(Layout(pp=2), lambda w: dies(w, ranks.arguments, "broadcast", "first"), "broadcast dies")
    ranks.finish()


if __name__ == "__main__":
    main()
