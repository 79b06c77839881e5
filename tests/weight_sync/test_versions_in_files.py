"""Weights that go through files: each server has every version's own tensors under its name, and no others."""

import asyncio
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from exprl_megatron.errors import ServerError
from exprl_megatron.weight_sync import delta
from exprl_megatron.weight_sync.delta_agent import answer_path, apply_request, write_whole
from exprl_megatron.weight_sync.disk import DiskTransport
from exprl_megatron.weight_sync.timing import SyncTimes

HOST = "127.0.0.1"
NAMES = ("first", "second", "third")


class Server:
    """Loads what it is asked to, as soon as it is asked."""

    def __init__(self, name: str):
        self.name, self.url, self.loaded = name, f"http://{HOST}:1", []

    async def update_from_disk(self, directory, version, deadline_s):
        found = {}
        for path in Path(directory).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                found |= {name: int(file.get_tensor(name)[0]) for name in file.keys()}  # noqa: SIM118
        self.loaded.append((version, found))


def exporter(value: int) -> SimpleNamespace:
    """Of three rounds with a tensor each."""

    def gather(number):
        tensor = torch.full((4,), float(value + number))
        message = SimpleNamespace(slots=[SimpleNamespace(name=NAMES[number])], nbytes=16)
        return SimpleNamespace(named=lambda: [(NAMES[number], tensor)], message=message)

    return SimpleNamespace(rounds=NAMES, gather=gather)


def weights(value: int) -> dict[str, int]:
    return {name: value + number for number, name in enumerate(NAMES)}


@pytest.fixture
def coordinator():
    return SimpleNamespace(signal=lambda: None, abort_on_error=nullcontext)


@pytest.fixture
def model(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return model


@pytest.fixture
def agent(monkeypatch, tmp_path):
    """Settings of the agent that all servers share.

    `late`: it answers after a while; `error`: what it reports; `local`: where its copy of the weights is.
    """
    local = tmp_path / "local"
    settings = SimpleNamespace(late=False, error=None, local=local)

    def serve(path, request):
        apply_request(request, path.parent, local)
        answer = {"id": request["id"], "local": str(local), "error": settings.error}
        write_whole(answer_path(path.parent, HOST), answer)

    def written(path, request):
        write_whole(path, request)
        if settings.late:
            asyncio.get_running_loop().call_later(0.1, serve, path, request)
        else:
            serve(path, request)

    monkeypatch.setattr(delta, "write_whole", written)
    monkeypatch.setattr(delta, "is_local_host", lambda host: False)
    return settings


def pushed(transport, versions) -> None:
    async def push():
        for version, value in versions:
            await transport.push(exporter(value), version, SyncTimes())

    asyncio.run(push())


def test_by_disk_every_server_loads_each_version_once_and_whole(model, coordinator, tmp_path):
    servers, shared = [Server("policy-0"), Server("policy-1")], tmp_path / "shared"
    pushed(DiskTransport(servers, shared, model, coordinator, 60.0), [("v1", 10), ("v2", 20)])
    for server in servers:
        assert server.loaded == [("v1", weights(10)), ("v2", weights(20))]
    assert list(shared.iterdir()) == []


@pytest.mark.parametrize("late", [False, True])
def test_by_delta_a_server_loads_what_its_agent_has_of_this_version_however_late_that_is(
    model, coordinator, agent, tmp_path, late
):
    servers, shared = [Server("policy-0"), Server("policy-1")], tmp_path / "shared"
    transport = delta.DeltaTransport(servers, shared, model, coordinator, 60.0)
    pushed(transport, [("v1", 10)])
    agent.late = late
    pushed(transport, [("v2", 20), ("v3", 20), ("v4", 40)])
    for server in servers:
        assert server.loaded == [("v1", weights(10)), ("v2", weights(20)), ("v3", weights(20)), ("v4", weights(40))]
    assert list(shared.glob("*.delta")) == []


def test_by_delta_servers_that_are_connected_later_begin_with_whole_weights(model, coordinator, agent, tmp_path):
    transport = delta.DeltaTransport([Server("policy-0")], tmp_path / "shared", model, coordinator, 60.0)
    pushed(transport, [("v1", 10)])
    newcomer = Server("policy-1")
    transport.connect([newcomer])
    # Its agent has no weights yet.
    shutil.rmtree(agent.local)
    pushed(transport, [("v2", 20)])
    assert newcomer.loaded == [("v2", weights(20))]


def test_by_delta_no_server_loads_what_its_agent_could_not_make(model, coordinator, agent, tmp_path):
    server = Server("policy-0")
    transport = delta.DeltaTransport([server], tmp_path / "shared", model, coordinator, 60.0)
    agent.error = "the disk is full"
    with pytest.raises(ServerError, match=r"agent on 127.0.0.1, for policy-0, failed: the disk is full"):
        pushed(transport, [("v1", 10)])
    assert server.loaded == []


def test_by_delta_an_agent_that_does_not_answer_is_named(model, coordinator, agent, tmp_path):
    server = Server("policy-0")
    transport = delta.DeltaTransport([server], tmp_path / "shared", model, coordinator, 0.0)
    agent.late = True
    with pytest.raises(ServerError, match=r"agent on 127.0.0.1, for policy-0, did not apply v1 within sync.deadline_s"):
        pushed(transport, [("v1", 10)])
    assert server.loaded == []
