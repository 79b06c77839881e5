"""Servers as files that keepers write and runs read, and whose share of them a node keeps."""

import time

import pytest

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.errors import UserError
from exprl_megatron.serving.launch import server_specs
from exprl_megatron.serving.registry import RegisteredServer, Registry
from exprl_megatron.training.serve import Share


def server(name="policy-0", **changes):
    known = {"kind": "policy", "name": name, "url": "http://127.0.0.1:9", "log_file": "l", "incarnation": "a"}
    return RegisteredServer(**known | changes)


def test_a_server_is_known_from_its_registration_to_its_withdrawal(tmp_path):
    registry = Registry(tmp_path / "servers")
    assert registry.all() == [] and registry.find("policy-0") is None
    registry.withdraw("policy-0")
    registry.register(server("policy-1"))
    registry.register(server())
    registry.register(server(incarnation="b"))
    assert Registry(tmp_path / "servers").all() == [server(incarnation="b"), server("policy-1")]
    registry.withdraw("policy-1")
    assert registry.all() == [server(incarnation="b")]


def test_the_wish_to_start_a_server_anew_is_for_one_incarnation_of_it(tmp_path):
    registry = Registry(tmp_path)
    assert registry.restart_asked("policy-0") is None
    registry.register(server())
    registry.ask_restart(server())
    assert registry.restart_asked("policy-0") == server().incarnation
    assert registry.all() == [server()]
    registry.withdraw("policy-0")
    assert registry.restart_asked("policy-0") is None


def test_the_end_of_an_earlier_attempt_is_told_from_that_of_this_one(tmp_path):
    registry = Registry(tmp_path)
    assert registry.ending() is None
    registry.end()
    earlier = registry.ending()
    registry.begin()
    assert registry.ending() is None
    time.sleep(0.01)
    registry.end()
    assert registry.ending() not in (None, earlier)


def test_servers_are_dealt_out_to_nodes_as_slurm_numbers_them(tmp_path, monkeypatch):
    specs = server_specs("policy", tmp_path, ServerConfig(count=5), tmp_path)
    shares = [[spec.name for spec in Share(rank, 2).of(specs)] for rank in range(2)]
    assert shares == [["policy-0", "policy-2", "policy-4"], ["policy-1", "policy-3"]]
    assert Share.of_this_node() == Share(0, 1)
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_NNODES", "4")
    assert Share.of_this_node() == Share(2, 4)
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert Share.of_this_node() == Share(1, 4)
    with pytest.raises(UserError, match="--node-rank is 4, but there are only 4 --nodes"):
        Share.of_this_node(4)
