"""What every rank does where servers refuse shards, and where a sync fails for another reason."""

import asyncio
from contextlib import contextmanager
from queue import Queue
from threading import Thread

import pytest

from exprl_megatron.errors import ServerError
from exprl_megatron.weight_sync import auto
from exprl_megatron.weight_sync.auto import AutoTransport
from exprl_megatron.weight_sync.coordinator import RankZeroFailed
from exprl_megatron.weight_sync.direct import CannotReceive


class Words:
    """The coordinator of two ranks in two threads."""

    def __init__(self):
        self._words = Queue()

    def signal(self, payload=None):
        self._words.put(True)

    @contextmanager
    def abort_on_error(self):
        try:
            yield
        except BaseException:
            self._words.put(False)
            raise

    def wait_signal(self):
        if not self._words.get(timeout=60):
            raise RankZeroFailed


class Way:
    """A transport that sends nothing, or fails; notes what each rank does by it."""

    def __init__(self, clients, server_tp, world, coordinator, deadline_s):
        self._coordinator = coordinator
        self.clients = clients

    def connect(self, clients):
        self.clients = clients

    async def push(self, exporter, version, times):
        DONE.append(("push", type(self).__name__))
        with self._coordinator.abort_on_error():
            if self.error is not None:
                raise self.error
            self._coordinator.signal()

    def follow(self, exporter):
        DONE.append(("follow", type(self).__name__))
        self._coordinator.wait_signal()


class Direct(Way):
    error = None


class Broadcast(Way):
    error = None


class Client:
    ended = 0

    async def end_weight_update(self, **_):
        Client.ended += 1


DONE: list[tuple[str, str]] = []


@pytest.fixture
def sync(monkeypatch):
    """`sync(error)`: one sync of both ranks by direct failing with `error`; how each ended, and by which ways."""
    monkeypatch.setattr(auto, "DirectTransport", Direct)
    monkeypatch.setattr(auto, "BroadcastTransport", Broadcast)
    Client.ended = 0
    coordinator, said = Words(), []
    leader, follower = (AutoTransport([Client()], 1, None, coordinator, 1.0, log=said.append) for _ in range(2))

    def once(error=None):
        DONE.clear()
        monkeypatch.setattr(Direct, "error", error)
        ends = {"leader": "well", "follower": "well"}

        def guarded(name, work):
            try:
                work()
            except (ServerError, RankZeroFailed) as stopped:
                ends[name] = type(stopped).__name__

        other = Thread(target=guarded, args=("follower", lambda: follower.follow(None)))
        other.start()
        guarded("leader", lambda: asyncio.run(leader.push(None, "v1", None)))
        other.join(timeout=60)
        assert coordinator._words.empty(), "each word was heard"
        return ends, {name: [way for who, way in DONE if who == name] for name in ("push", "follow")}

    once.ranks, once.said = (leader, follower), said
    return once


def test_all_ranks_continue_with_broadcasts_and_stay_there_until_other_servers_come(sync):
    refusal = CannotReceive("policy-0 has another loader")
    well = {"leader": "well", "follower": "well"}
    both, one = ["Direct", "Broadcast"], ["Broadcast"]
    assert sync(refusal) == (well, {"push": both, "follow": both})
    assert Client.ended == 1, "the weight update that direct began is closed"
    assert sync(refusal) == (well, {"push": one, "follow": one})
    assert len(sync.said) == 1 and "policy-0" in sync.said[0]
    for rank in sync.ranks:
        rank.connect([Client()])
    assert sync() == (well, {"push": ["Direct"], "follow": ["Direct"]})


def test_another_failure_ends_every_rank_and_is_tried_by_direct_again(sync):
    ended = {"leader": "ServerError", "follower": "RankZeroFailed"}
    for _ in range(2):
        assert sync(ServerError("policy-0 died")) == (ended, {"push": ["Direct"], "follow": ["Direct"]})
    assert sync.said == []
