"""The stores in which a server's ranks meet, as torch makes them for an init method."""

import importlib
import sys
from datetime import timedelta

import psutil
import pytest

from exprl_megatron.serving.server_command import PLUGINS
from exprl_megatron.utils.ports import free_ports

rendezvous = importlib.import_module("torch.distributed.rendezvous")


@pytest.fixture
def plugin(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(PLUGINS)])
    monkeypatch.setattr(rendezvous, "TCPStore", rendezvous.TCPStore)
    import exprl_private_stores

    return exprl_private_stores


def listening() -> set[tuple[str, int]]:
    return {c.laddr[:2] for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}


def meet(rank: int, port: int):
    method = f"tcp://127.0.0.1:{port}"
    return next(rendezvous.rendezvous(method, rank, 1, timeout=timedelta(seconds=20)))[0]


def test_a_store_of_an_init_method_listens_at_its_address_alone(plugin):
    plugin.activate()
    plugin.activate()
    (port,) = free_ports(1)
    before = listening()
    store, member = meet(0, port), meet(1, port)
    assert listening() - before == {("127.0.0.1", port)}
    member.set("name", "value")
    assert store.get("name") == b"value"


def test_a_name_of_another_machine_is_left_to_torch(plugin):
    asked = []
    made = plugin.at_its_address(lambda *arguments, **settings: asked.append((arguments, settings)))
    # 192.0.2.0/24 belongs to nobody (RFC 5737).
    made("192.0.2.1", 29500, 2, is_master=True, use_libuv=True)
    made("127.0.0.1", 29500, 2, is_master=False)
    assert asked == [
        (("192.0.2.1", 29500, 2), {"is_master": True, "use_libuv": True}),
        (("127.0.0.1", 29500, 2), {"is_master": False}),
    ]


def test_sglang_finds_the_plugin_where_servers_look(plugin):
    from importlib.metadata import distributions

    entries = [entry for found in distributions(path=[str(PLUGINS)]) for entry in found.entry_points]
    assert plugin.activate in [entry.load() for entry in entries if entry.group == "sglang.srt.plugins"]
