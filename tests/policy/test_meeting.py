"""Where the trainer's ranks find each other: at one address, and under names that only the run's key tells."""

import psutil
import pytest
import torch.distributed as dist

from exprl_megatron.errors import UserError
from exprl_megatron.policy import world
from exprl_megatron.utils.ports import free_ports


@pytest.fixture
def rank_0(monkeypatch):
    """The stores with which rank 0 of two enters its worlds."""
    entered = []
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_ports(1)[0],
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(world, "_store", None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, store, rank, world_size, timeout: entered.append(store))
    return entered


def listening() -> set[tuple[str, int]]:
    return {c.laddr[:2] for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}


def test_a_client_without_the_key_finds_no_rank_at_the_known_port(rank_0):
    before = listening()
    world._start_process_group(10.0, "the run's key")
    ((address, port),) = listening() - before
    assert address == "127.0.0.1"
    rank_0[0].set("rank 0", "its address")
    stranger = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
    assert not stranger.check(["rank 0"]) and not stranger.check(["default_pg/rank 0"])
    stranger.set("rank 1", "the stranger's address")
    assert not rank_0[0].check(["rank 1"])


def test_a_later_world_meets_in_the_same_store_under_other_names(rank_0):
    before = listening()
    for _ in range(2):
        world._start_process_group(10.0, "the run's key")
    assert len(listening() - before) == 1
    rank_0[0].set("rank 0", "its address")
    assert not rank_0[1].check(["rank 0"])
    assert rank_0[0].underlying_store.port == rank_0[1].underlying_store.port


def test_a_rank_that_does_not_know_where_the_others_are_says_so(rank_0, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(UserError, match="RANK is set in the environment and MASTER_ADDR is not; start all ranks with"):
        world._start_process_group(10.0, None)
