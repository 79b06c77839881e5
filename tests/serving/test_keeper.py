"""When a keeper starts a server again that has ended, and when it is told to wait."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.serving import keeper as module
from exprl_megatron.serving.keeper import Keeper
from exprl_megatron.serving.keys import ensure_key
from exprl_megatron.serving.registry import Registry
from exprl_megatron.serving.server_process import ServerSpec


@pytest.fixture
def launched(monkeypatch):
    """The servers that were started, which are ready and alive until they are said not to be."""
    servers = []

    def launch(specs, starter):
        for spec in specs:
            server = SimpleNamespace(
                name=spec.name,
                url="http://127.0.0.1:9",
                log_file="log",
                key_file=spec.key_file,
                incarnation=str(len(servers)),
                first_gpu=0,
                registered=False,
                well=True,
                is_ready=True,
                stop=lambda: None,
            )
            server.alive = lambda server=server: server.well
            server.ready = lambda server=server: server.is_ready
            servers.append(server)
        return servers[-len(specs) :]

    monkeypatch.setattr(module, "launch_servers", launch)
    monkeypatch.setattr(module, "stop_servers", lambda servers: None)
    return servers


@pytest.fixture
def keeper(tmp_path, launched):
    registry = Registry(tmp_path)
    ensure_key(registry.key_file)
    specs = [ServerSpec(name, Path("model"), ServerConfig(), tmp_path) for name in ("policy-0", "judge-0")]
    made = Keeper(specs, registry)
    made.start()
    made.tend()
    return made


def test_a_server_that_died_while_its_devices_are_the_trainer_s_starts_when_it_may(tmp_path, keeper, launched):
    registry = Registry(tmp_path)
    registry.hold_starts("policy")
    for server in launched:
        server.well = False
    for _ in range(3):
        keeper.tend()
    assert [server.name for server in launched[2:]] == ["judge-0"], "it has devices of its own"
    assert registry.find("policy-0") is None and registry.starting("policy") == []
    registry.allow_starts("policy")
    keeper.tend()
    assert [server.name for server in launched[2:]] == ["judge-0", "policy-0"]
    keeper.tend()
    assert registry.find("policy-0").incarnation == launched[3].incarnation


def test_a_server_that_starts_again_counts_as_starting_until_it_is_registered(tmp_path, keeper, launched):
    registry = Registry(tmp_path)
    launched[0].well = False
    keeper.tend()
    launched[2].is_ready = False
    keeper.tend()
    assert registry.starting("policy") == ["policy-0"]
    launched[2].is_ready = True
    keeper.tend()
    assert registry.starting("policy") == [] and registry.find("policy-0") is not None


def test_a_server_that_is_of_no_use_is_ended_though_its_successor_has_to_wait(tmp_path, keeper, launched):
    registry, ended = Registry(tmp_path), []
    launched[0].stop = lambda: ended.append("policy-0")
    registry.ask_restart(registry.find("policy-0"))
    registry.hold_starts("policy")
    keeper.tend()
    assert ended == ["policy-0"] and len(launched) == 2, "it holds memory that the trainer wants"
    assert registry.find("policy-0") is None
    keeper.stop()
    assert registry.starting("policy") == []
