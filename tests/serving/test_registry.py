"""Servers as files that supervisors write and runs read, and whose share of them a node keeps."""

import json
import time
from dataclasses import asdict

import pytest

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.errors import UserError
from exprl_megatron.launch.serve import ServerShare
from exprl_megatron.serving.keys import ensure_key, fingerprint, read_key
from exprl_megatron.serving.registry import RegisteredServer, Registry
from exprl_megatron.serving.server_spec import server_specs


def server(name="policy-0", **changes):
    known = {"kind": "policy", "name": name, "url": "http://127.0.0.1:9", "log_file": "l", "instance_id": "a"}
    return RegisteredServer(**known | changes)


def test_a_server_is_known_from_its_registration_to_its_withdrawal(tmp_path):
    registry = Registry(tmp_path / "servers")
    assert registry.all() == [] and registry.find("policy-0") is None
    registry.withdraw("policy-0")
    registry.register(server("policy-1"))
    registry.register(server())
    registry.register(server(instance_id="b"))
    assert Registry(tmp_path / "servers").all() == [server(instance_id="b"), server("policy-1")]
    registry.withdraw("policy-1")
    assert registry.all() == [server(instance_id="b")]


def test_the_wish_to_restart_a_server_is_for_one_instance_of_it(tmp_path):
    registry = Registry(tmp_path)
    assert registry.requested_restart("policy-0") is None
    registry.register(server())
    registry.request_restart(server())
    assert registry.requested_restart("policy-0") == server().instance_id
    assert registry.all() == [server()]
    registry.withdraw("policy-0")
    assert registry.requested_restart("policy-0") is None


def test_the_end_of_an_earlier_attempt_is_distinguished_from_that_of_this_one(tmp_path):
    registry = Registry(tmp_path)
    assert registry.ended_at() is None
    registry.mark_ended()
    earlier = registry.ended_at()
    registry.clear_end()
    assert registry.ended_at() is None
    time.sleep(0.01)
    registry.mark_ended()
    assert registry.ended_at() not in (None, earlier)


def test_servers_are_dealt_out_to_nodes_as_slurm_numbers_them(tmp_path, monkeypatch):
    specs = server_specs("policy", tmp_path, ServerConfig(count=5), tmp_path)
    shares = [[spec.name for spec in ServerShare(rank, 2).select(specs)] for rank in range(2)]
    assert shares == [["policy-0", "policy-2", "policy-4"], ["policy-1", "policy-3"]]
    assert ServerShare.from_slurm() == ServerShare(0, 1)
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_NNODES", "4")
    assert ServerShare.from_slurm() == ServerShare(2, 4)
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert ServerShare.from_slurm() == ServerShare(1, 4)
    with pytest.raises(UserError, match="--node-rank is 4, but there are only 4 --nodes"):
        ServerShare.from_slurm(4)


GARBAGE = {
    "not JSON": b"{",
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "no UTF-8": b"\xff\xfe",
    "nested": b"[" * 200_000,
    "another version's": json.dumps(asdict(server()) | {"later": 1}).encode(),
    "lacking a field": b'{"kind": "policy", "name": "policy-0"}',
    "of another name": json.dumps(asdict(server("policy-1"))).encode(),
    "a number for a text": json.dumps(asdict(server()) | {"url": 5}).encode(),
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_a_registration_that_cannot_be_taken_is_reported_once_and_skipped(tmp_path, content):
    registry = Registry(tmp_path)
    registry.register(server("policy-2"))
    (tmp_path / "policy-0.json").write_bytes(content)
    for _ in range(3):
        assert registry.all() == [server("policy-2")]
    (told,) = registry.warnings()
    assert told.startswith(f"The registration {tmp_path}/policy-0.json is skipped: ") and len(told) < 500
    assert registry.all() == [server("policy-2")] and registry.warnings() == []
    registry.register(server())
    assert registry.all() == [server(), server("policy-2")]


def test_a_registration_that_may_not_be_read_is_skipped(tmp_path):
    registry = Registry(tmp_path)
    (tmp_path / "policy-0.json").mkdir()
    assert registry.all() == []
    assert "is skipped" in registry.warnings()[0]


def test_servers_that_do_not_know_the_runs_key_are_not_taken(tmp_path):
    registry = Registry(tmp_path)
    ensure_key(registry.key_file)
    own = server(run=fingerprint(read_key(registry.key_file)))
    registry.register(own)
    registry.register(server("policy-1"))
    registry.register(server("policy-2", run="0" * 16))
    assert registry.all() == [own]
    assert [told.rpartition(": ")[2] for told in registry.warnings()] == ["it belongs to another run"] * 2
    assert registry.authorization(own) == {"Authorization": f"Bearer {registry.key_file.read_text()}"}
    assert registry.key_file.read_text() not in (tmp_path / "policy-0.json").read_text()
