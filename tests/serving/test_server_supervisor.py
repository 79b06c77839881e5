"""When a supervisor restarts a server that has ended, and when it must wait."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.serving import server_supervisor as module
from exprl_megatron.serving.keys import ensure_key
from exprl_megatron.serving.registry import Registry
from exprl_megatron.serving.server_spec import ServerSpec
from exprl_megatron.serving.server_supervisor import ServerSupervisor


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
                instance_id=str(len(servers)),
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
def supervisor(tmp_path, launched):
    registry = Registry(tmp_path)
    ensure_key(registry.key_file)
    specs = [ServerSpec(name, Path("model"), ServerConfig(), tmp_path) for name in ("policy-0", "judge-0")]
    made = ServerSupervisor(specs, registry)
    made.start()
    made.poll()
    return made


def test_a_server_that_died_while_its_devices_are_the_trainer_s_starts_when_it_may(tmp_path, supervisor, launched):
    registry = Registry(tmp_path)
    registry.hold_starts("policy")
    for server in launched:
        server.well = False
    for _ in range(3):
        supervisor.poll()
    assert [server.name for server in launched[2:]] == ["judge-0"], "it has devices of its own"
    assert registry.find("policy-0") is None and registry.starting_servers("policy") == []
    registry.allow_starts("policy")
    supervisor.poll()
    assert [server.name for server in launched[2:]] == ["judge-0", "policy-0"]
    supervisor.poll()
    assert registry.find("policy-0").instance_id == launched[3].instance_id


def test_a_server_that_starts_again_counts_as_starting_until_it_is_registered(tmp_path, supervisor, launched):
    registry = Registry(tmp_path)
    launched[0].well = False
    supervisor.poll()
    launched[2].is_ready = False
    supervisor.poll()
    assert registry.starting_servers("policy") == ["policy-0"]
    launched[2].is_ready = True
    supervisor.poll()
    assert registry.starting_servers("policy") == [] and registry.find("policy-0") is not None


def test_a_server_that_is_of_no_use_is_ended_though_its_successor_has_to_wait(tmp_path, supervisor, launched):
    registry, ended = Registry(tmp_path), []
    launched[0].stop = lambda: ended.append("policy-0")
    registry.request_restart(registry.find("policy-0"))
    registry.hold_starts("policy")
    supervisor.poll()
    assert ended == ["policy-0"] and len(launched) == 2, "it holds memory that the trainer wants"
    assert registry.find("policy-0") is None
    supervisor.stop()
    assert registry.starting_servers("policy") == []
