"""A run that is over leaves its servers; one that died after the last sync costs it neither its end nor a thread."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from exprl_megatron.config.serving import SyncConfig
from exprl_megatron.errors import ServerError
from exprl_megatron.serving import process_groups
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.direct import DirectTransport
from exprl_megatron.weight_sync.sync import WeightSync
from exprl_megatron.weight_sync.weight_groups import WeightGroups

DEADLINE_S = 3600.0
RETURN_S = 60.0
GO, STOP = [True, None], [False, None]


class Group:
    """A group that is given up when the other members do so too, which they never do, or when it is aborted."""

    def __init__(self, others_leave: bool):
        self.free = threading.Event()
        self.aborted = threading.Event()
        if others_leave:
            self.free.set()

    def abort(self):
        self.aborted.set()
        self.free.set()


class Gone:
    """A server that takes no connection any more."""

    name = "policy-0"

    async def fail(self, *_, **settings):
        raise ServerError("policy-0 is gone")

    begin_weight_update = destroy_weights_group = fail


class Well:
    """A server that does whatever it is asked."""

    name = "policy-0"

    async def obey(self, *_, **settings):
        return None

    begin_weight_update = end_weight_update = destroy_weights_group = obey


class Signals(RankCoordinator):
    """Rank 0's signals, as it sends them or as the others receive them, with an event loop for each request."""

    def __init__(self, *heard, is_rank0=True):
        self._heard = list(heard)
        self.said = []
        self.is_rank0 = is_rank0

    def _broadcast_signal(self, message):
        if self._heard:
            return self._heard.pop(0)
        self.said.append(list(message))
        return message

    def run(self, coroutine):
        return asyncio.run(coroutine)


def direct_with(group, server, coordinator):
    transport = DirectTransport([server], 1, None, coordinator, DEADLINE_S)
    transport._group = group

    async def commanded(what, version=None):
        return None

    transport._command = commanded
    return transport


def broadcasts_with(group, server, coordinator):
    members = WeightGroups(1, None, coordinator, DEADLINE_S)
    members.names, members._group, members._thread = ["group"], group, SimpleNamespace(stop=lambda: None)
    return SimpleNamespace(close=lambda: members.close([server]), follow_close=members.follow_close)


TRANSPORTS = pytest.mark.parametrize("made", [direct_with, broadcasts_with])


@pytest.fixture
def close(monkeypatch):
    """`close(made, group, server, coordinator)`: the end of a run on the coordinator's rank."""
    monkeypatch.setattr(process_groups.dist, "destroy_process_group", lambda group: group.free.wait(DEADLINE_S))
    monkeypatch.setattr(process_groups.dist, "get_backend", lambda group: "nccl")

    def close(made, group, server, coordinator):
        sync = WeightSync(SyncConfig(), None, coordinator, None, made(group, server, coordinator))
        process_groups.in_background("close", sync.close).result(RETURN_S)

    return close


@TRANSPORTS
def test_a_run_whose_server_died_after_the_last_sync_ends_well_and_aborts_the_group(close, made):
    group, coordinator = Group(others_leave=False), Signals()
    close(made, group, Gone(), coordinator)
    assert group.aborted.is_set(), "what waits for the server is freed"
    assert coordinator.said == [STOP]


@TRANSPORTS
def test_the_other_ranks_do_not_wait_for_a_server_that_rank_0_knows_to_be_dead(close, made):
    group = Group(others_leave=False)
    close(made, group, None, Signals(STOP, is_rank0=False))
    assert group.aborted.is_set()


@TRANSPORTS
@pytest.mark.parametrize("is_rank0", [True, False])
def test_a_group_that_all_give_up_is_not_aborted(close, made, is_rank0):
    group, coordinator = Group(others_leave=True), Signals(*([] if is_rank0 else [GO]), is_rank0=is_rank0)
    close(made, group, Well(), coordinator)
    assert not group.aborted.is_set()
    assert coordinator.said == ([GO] if is_rank0 else [])


@TRANSPORTS
def test_a_rank_without_a_group_hears_nothing_where_none_is_open(close, made):
    coordinator = Signals()
    sync = made(None, Well(), coordinator)
    if made is broadcasts_with:
        sync.follow_close.__self__.names = []
    sync.follow_close()
    asyncio.run(sync.close())
    assert coordinator.said == []


def test_a_pipeline_stage_s_other_ranks_hear_that_the_groups_are_given_up():
    coordinator = Signals(STOP, is_rank0=False)
    broadcasts_with(None, None, coordinator).follow_close()
    assert not coordinator._heard, "rank 0's words reach all ranks, those without a group too"


def test_another_fault_at_the_end_is_raised():
    async def close():
        raise ValueError("a fault of ours")

    with pytest.raises(ValueError, match="of ours"):
        WeightSync(SyncConfig(), None, Signals(), None, SimpleNamespace(close=close, follow_close=None)).close()
