"""Weights that go through groups: a server is given a version once, with the last of its weights, within one update."""

import asyncio
from concurrent.futures import Future
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from exprl_megatron.weight_sync.broadcast import BroadcastTransport
from exprl_megatron.weight_sync.direct import DirectTransport
from exprl_megatron.weight_sync.handles import HandlesTransport
from exprl_megatron.weight_sync.timing import SyncTimes

WORLD = SimpleNamespace(layout=SimpleNamespace(world_size=1), device="cpu")
ROUNDS = [[SimpleNamespace(nbytes=4)] for _ in range(3)]


class Server:
    """Writes down what it is asked."""

    def __init__(self, name: str):
        self.name, self.url, self.asked = name, "http://127.0.0.1:1", []

    async def begin_weight_update(self, deadline_s):
        self.asked.append("begin")

    async def end_weight_update(self, deadline_s):
        self.asked.append("end")

    async def update_from_tensor(self, commands, version, flush_cache, loader, deadline_s):
        self.asked.append((commands[0]["do"], version, flush_cache))


class Groups:
    """In place of groups that are open: writes down which version each round of a server names."""

    names = ("group",)

    async def ask(self, server, messages, version):
        server.asked.append(("round", version))

    def send(self, filled):
        sent = Future()
        sent.set_result(0.0)
        return sent


@pytest.fixture
def coordinator():
    return SimpleNamespace(signal=lambda: None, abort_on_error=nullcontext)


def pushed(transport, *versions: str) -> None:
    exporter = SimpleNamespace(rounds=ROUNDS, gather=lambda number: None, gatherer=None)

    async def push():
        for version in versions:
            await transport.push(exporter, version, SyncTimes())

    asyncio.run(push())


def test_by_broadcast_the_last_round_names_the_version(coordinator):
    servers = [Server("policy-0"), Server("policy-1")]
    transport = BroadcastTransport(servers, 1, WORLD, coordinator, 60.0)
    transport._groups = Groups()
    pushed(transport, "v1", "v2")
    for server in servers:
        expected = []
        for version in ("v1", "v2"):
            expected += ["begin", ("round", None), ("round", None), ("round", version), "end"]
        assert server.asked == expected


def test_direct_transfers_are_finished_under_the_version_once_they_have_arrived(coordinator):
    servers = [Server("policy-0"), Server("policy-1")]
    transport = DirectTransport(servers, 1, WORLD, coordinator, 60.0)
    transport._group = object()
    transport._store = SimpleNamespace(key="k", host="h", port=1, check=lambda names: True, get=lambda name: b"")
    transport._sending = SimpleNamespace(begin=lambda gatherer, group: Groups().send(None))
    pushed(transport, "v1", "v2")
    for server in servers:
        expected = []
        for version in ("v1", "v2"):
            expected += ["begin", ("receive", None, False), ("finish", version, True), "end"]
        assert server.asked == expected


def test_by_handles_the_last_round_names_the_version_and_empties_the_cache(coordinator):
    class Colocated(Server):
        first_gpu = 0

        async def update_from_tensor(self, payloads, version, flush_cache, deadline_s):
            self.asked.append((len(payloads), version, flush_cache))

    coordinator.is_rank0, coordinator.collect = True, lambda own: [own]
    coordinator.signal = lambda value=None: None
    servers = [Colocated("policy-0"), Colocated("policy-1")]
    world = SimpleNamespace(rank=0, device="cpu")
    transport = HandlesTransport(servers, 1, world, coordinator, 60.0)
    filled = SimpleNamespace(named=lambda: [("weight", torch.zeros(1))])
    exporter = SimpleNamespace(rounds=ROUNDS, gather=lambda number: filled)
    for version in ("v1", "v2"):
        asyncio.run(transport.push(exporter, version, SyncTimes()))
    for server in servers:
        expected = []
        for version in ("v1", "v2"):
            expected += ["begin", (1, None, False), (1, None, False), (1, version, True), "end"]
        assert server.asked == expected
