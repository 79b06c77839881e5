"""When weights are pushed, to whom, and what makes them count as served; servers, transport and check are scripted."""

import asyncio
from types import SimpleNamespace

import pytest
from helpers.scripted_run import OneRank

from exprl_megatron.config.serving import SyncConfig
from exprl_megatron.errors import ServerError, WeightsDiffer
from exprl_megatron.serving.static_pool import StaticPool
from exprl_megatron.weight_sync import sync as module
from exprl_megatron.weight_sync.sync import WeightSync

SUMS = {"a": "1", "b": "2"}


class Alone(OneRank):
    """With what a sync asks of its coordinator beside that."""

    def run_collective(self, on_rank0, on_others):
        on_rank0()

    def start(self, coroutine):
        result = asyncio.run(coroutine)
        return SimpleNamespace(result=lambda: result)

    def collect(self, item):
        return [item]


class Fleet:
    """Servers of `names`; after a failed push those of `left` are prepared. Records its calls."""

    def __init__(self, *names, left=None):
        self.names, self.left, self.events, self.version = names, left, [], None
        self._clients = {name: SimpleNamespace(name=name) for name in (*names, *(left or ()))}

    @property
    def clients(self):
        return [self._clients[name] for name in self.names]

    async def prepare(self, version):
        return version != self.version

    async def commit(self, version):
        self.events.append(f"commit {version}")
        self.version = version

    async def abort(self, error):
        self.events.append(f"abort: {error}")
        if self.left is None:
            raise error
        self.names = self.left


class Transport:
    """Keeps what it is asked for; a push fails with the next of `failures`, if it is not None."""

    source_ranks = None

    def __init__(self, *failures):
        self.failures, self.events = list(failures), []

    def connect(self, clients):
        self.events.append(("connect", list(clients)))

    def allocate(self, nbytes):
        return None

    async def push(self, exporter, version, times):
        self.events.append(("push", version))
        if self.failures and (failure := self.failures.pop(0)) is not None:
            raise failure


class Check:
    """A check whose servers hold the sums of `held`; keeps its calls."""

    bucket_check = None

    def __init__(self, held, events):
        self._held, self.events = held, events

    def begin(self, exporter):
        self.events.append("check begins")

    def own(self, exporter):
        return SUMS

    def expected(self, parts):
        return [parts[0]]

    async def held(self, clients):
        self.events.append("servers are asked")
        return [[self._held] for _ in clients]

    def end(self):
        self.events.append("check ends")


@pytest.fixture
def sync_of(monkeypatch):
    """`sync_of(members, transport, held)`: a WeightSync; every server holds tensors with the sums `held`."""

    def make(members, transport, held=SUMS, verify=True):
        monkeypatch.setattr(module, "WeightExporter", lambda *_, **__: exporter)
        gathered = SimpleNamespace(count=0)

        def gather_weights():
            gathered.count += 1

        exporter = SimpleNamespace(
            nbytes=8, gather_s=0.5, quantize_s=0.25, wait_checks=lambda: transport.events.append("checked")
        )
        policy = SimpleNamespace(chunks=[], architecture=None, world=None, gather_weights=gather_weights)
        made = WeightSync(SyncConfig(verify=verify), policy, Alone(), members, transport)
        made._new_check = lambda: Check(held, transport.events) if verify else None
        made.gathered = gathered
        return made

    return make


def pushes(transport):
    return [event for event in transport.events if event[0] in ("connect", "push")]


def test_a_version_is_pushed_once_to_servers_that_are_connected_once(sync_of):
    members, transport = Fleet("one", "two"), Transport()
    sync = sync_of(members, transport)
    first = sync.push_weights("v1")
    assert sync.push_weights("v1") == {}
    sync.push_weights("v2")
    assert pushes(transport) == [("connect", members.clients), ("push", "v1"), ("push", "v2")]
    assert members.events == ["commit v1", "commit v2"]
    assert (first["sync/gather"], first["sync/quantize"], first["sync/gb"]) == (0.5, 0.25, 8e-9)
    assert sync.gathered.count == 2, "every push is of the policy's current weights"


def test_a_server_that_joined_is_connected_with_the_others_before_the_next_push(sync_of):
    members, transport = Fleet("one", left=("one", "two")), Transport()
    sync = sync_of(members, transport)
    sync.push_weights("v1")
    members.names = ("one", "two")
    sync.push_weights("v2")
    assert [name for name, *_ in pushes(transport)] == ["connect", "push", "connect", "push"]
    assert [client.name for client in pushes(transport)[2][1]] == ["one", "two"]


def test_a_failed_push_is_repeated_for_the_servers_that_are_left_over_new_connections(sync_of):
    members, transport = Fleet("one", "two", left=("one", "two")), Transport(ServerError("two died"))
    metrics = sync_of(members, transport).push_weights("v1")
    assert [name for name, *_ in pushes(transport)] == ["connect", "push"] * 2
    assert members.events == ["abort: two died", "commit v1"]
    assert "sync/seconds" in metrics


def test_where_no_server_is_left_the_failure_is_the_runs(sync_of):
    members, transport = Fleet("one"), Transport(ServerError("one died"))
    with pytest.raises(ServerError, match="one died"):
        sync_of(members, transport).push_weights("v1")
    assert members.events == ["abort: one died"]


def test_an_error_of_the_trainer_itself_is_not_blamed_on_the_servers(sync_of):
    members, transport = Fleet("one", left=("one",)), Transport(ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        sync_of(members, transport).push_weights("v1")
    assert members.events == []


def test_servers_that_hold_other_bytes_end_the_run_and_do_not_count_as_served(sync_of):
    members, transport = Fleet("one", "two", left=("one",)), Transport()
    with pytest.raises(
        WeightsDiffer, match=r"one does not hold the weights of v1 after the sync: 1 of 2 tensors .* b;"
    ):
        sync_of(members, transport, held=SUMS | {"b": "3"}).push_weights("v1")
    assert members.events == []


def test_servers_are_asked_for_their_sums_after_the_push_and_the_check_ends_in_any_case(sync_of):
    transport = Transport()
    sync_of(Fleet("one"), transport).push_weights("v1")
    assert transport.events[1:] == ["check begins", ("push", "v1"), "servers are asked", "checked", "check ends"]
    transport = Transport(ServerError("died"))
    with pytest.raises(ServerError):
        sync_of(Fleet("one"), transport).push_weights("v1")
    assert transport.events[1:] == ["check begins", ("push", "v1"), "checked", "check ends"]


def test_without_the_check_nothing_is_asked(sync_of):
    members, transport = Fleet("one"), Transport()
    sync_of(members, transport, held={}, verify=False).push_weights("v1")
    assert pushes(transport)[1:] == [("push", "v1")] and "servers are asked" not in transport.events
    assert members.events == ["commit v1"]


def test_fixed_servers_are_given_a_version_once():
    async def run():
        servers = StaticPool(["one"])
        assert await servers.prepare("v1")
        assert await servers.prepare("v1"), "nothing was pushed yet"
        await servers.commit("v1")
        assert not await servers.prepare("v1")
        assert await servers.prepare("v2")

    asyncio.run(run())
