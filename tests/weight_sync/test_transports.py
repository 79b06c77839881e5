"""Weights of a Megatron policy reach a real SGLang server, bit for bit, by every transport."""

import asyncio
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from helpers.forking import starter
from transformers import AutoModelForCausalLM

from exprl_megatron.config.policy import PolicyConfig
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.config.transport import TransportChoice
from exprl_megatron.errors import ServerError, UserError
from exprl_megatron.policy.gather import gather_buckets
from exprl_megatron.policy.policy import Policy
from exprl_megatron.policy.world import enter_world, leave_world
from exprl_megatron.serving.checksums import checksums
from exprl_megatron.serving.loader_commands import LOADER
from exprl_megatron.serving.server_process import start_servers
from exprl_megatron.serving.server_spec import ServerSpec
from exprl_megatron.weight_sync.auto import AutoTransport
from exprl_megatron.weight_sync.broadcast import BroadcastTransport
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.direct import CannotReceive, DirectTransport
from exprl_megatron.weight_sync.timing import SyncTimes
from exprl_megatron.weight_sync.transports import make_transport
from exprl_megatron.weight_sync.weight_check import compare, held_checksums
from exprl_megatron.weight_sync.weight_exporter import WeightExporter

pytestmark = pytest.mark.slow

PROMPT = (5, 6, 7, 8, 9, 10, 11)
BUCKET_BYTES = 40_000


@pytest.fixture(scope="module")
def other(tiny_model) -> Path:
    """A model of the server's shape with other weights."""
    return tiny_model("qwen3", seed=7)


@pytest.fixture(scope="module")
def policy(other, collectives):
    config = PolicyConfig(model=str(other))
    enter_world(config.layout)
    yield Policy(config, seed=0)
    leave_world()


@pytest.fixture
def client(qwen3_server, tiny_model):
    """A client of the running server, which gets its own weights back afterwards."""
    yield qwen3_server.client()

    async def restore():
        async with qwen3_server.client() as client:
            await client.reset(deadline_s=60)
            await client.update_from_disk(tiny_model("qwen3"), "initial")

    asyncio.run(restore())


def greedy(model: Path) -> list[int]:
    """What transformers writes after PROMPT with these weights."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    written = loaded.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=12)
    return written[0, len(PROMPT) :].tolist()


def exporter(policy, transport) -> WeightExporter:
    return WeightExporter(
        policy.chunks,
        policy.architecture,
        policy.world,
        BUCKET_BYTES,
        source_ranks=transport.source_ranks,
        allocate=transport.allocate,
    )


async def pushed(client, transport, policy, version, leaving=None):
    """Push, then sample: the tokens, the version that the server says wrote them, its checksums, the times."""
    times = SyncTimes()
    async with client:
        await transport.push(leaving or exporter(policy, transport), version, times)
        generation = await client.generate(PROMPT, temperature=0.0, max_new_tokens=12, seed=1)
        held = await client.checksums()
        await transport.close()
        return list(generation.token_ids), {span[0] for span in generation.weight_versions}, held, times


def tensors(policy):
    """All of the policy's weights under their Hugging Face names."""
    buckets = gather_buckets(policy.chunks, policy.architecture, policy.world, 2**30)
    return [pair for bucket in buckets for pair in bucket]


def transport_called(name, client, policy, other, tmp_path):
    coordinator, directory = RankCoordinator(120.0), tmp_path / "sync"
    choice = TransportChoice("direct", "", "broadcast") if name == "auto" else TransportChoice(name, "")
    return make_transport(choice, [client], 1, policy.world, coordinator, 60, directory=directory, model=other)


@pytest.mark.parametrize("name", ["auto", "broadcast", "direct", "handles", "disk", "delta"])
def test_the_server_then_writes_what_transformers_writes(name, client, policy, other, tmp_path):
    transport = transport_called(name, client, policy, other, tmp_path)
    tokens, versions, held, times = asyncio.run(pushed(client, transport, policy, "v1"))
    assert len(exporter(policy, transport).rounds) > 2
    assert tokens == greedy(other)
    assert versions == {"v1"}
    expected = checksums(tensors(policy), tied=False)
    assert held == (expected,)
    whole = sum(tensor.nbytes for _, tensor in tensors(policy))
    assert exporter(policy, transport).nbytes == whole
    assert times.moved == (0 if name == "handles" else whole)
    assert times.load_s > 0


@pytest.mark.parametrize("name", ["disk", "delta"])
def test_transports_by_files_leave_no_weights_behind(name, client, policy, other, tmp_path):
    transport = transport_called(name, client, policy, other, tmp_path)
    asyncio.run(pushed(client, transport, policy, "v1"))
    assert not (tmp_path / "sync").exists()


def test_after_the_first_time_a_delta_has_only_what_changed(client, policy, other, tmp_path):
    transport = transport_called("delta", client, policy, other, tmp_path)
    norm = policy.chunks[0].decoder.final_layernorm.weight.data

    async def push_twice():
        first, second = SyncTimes(), SyncTimes()
        async with client:
            await transport.push(exporter(policy, transport), "v1", first)
            norm[3] += 1.0
            await transport.push(exporter(policy, transport), "v2", second)
            held, info = await client.checksums(), await client.info()
            await transport.close()
            return first.moved, second.moved, held, info["weight_version"]

    first, second, held, version = asyncio.run(push_twice())
    expected = checksums(tensors(policy), tied=False)
    norm[3] -= 1.0
    assert held == (expected,) and version == "v2"
    assert first == exporter(policy, transport).nbytes
    assert second < 600


def test_a_server_that_holds_other_weights_is_found_out_by_name(client, policy):
    expected = checksums(tensors(policy), tied=False)

    async def check():
        async with client:
            compare([client], await held_checksums([client], deadline_s=60), [expected], "v1")

    with pytest.raises(ServerError, match=r"policy-0 does not hold the weights of v1 after the sync.*first lm_head"):
        asyncio.run(check())


def test_a_refusal_is_an_error_and_not_a_hang(tiny_model, policy, tmp_path, monkeypatch):
    async def push_to_another_group(client):
        transport = BroadcastTransport([client], 1, policy.world, RankCoordinator(120.0), deadline_s=60)
        async with client:
            await transport.push(exporter(policy, transport), "v1", SyncTimes())
            # The server is in no such group.
            monkeypatch.setattr(transport._groups, "names", ["another"])
            await transport.push(exporter(policy, transport), "v2", SyncTimes())

    # A server of its own: SGLang ends itself where an update fails half-way.
    spec = ServerSpec("leaver", tiny_model("qwen3"), ServerConfig(), tmp_path)
    with (
        start_servers([spec], starter())[0] as server,
        pytest.raises(ServerError, match=r"leaver.*asked /update_weights_from_distributed: (refused|died)"),
    ):
        asyncio.run(asyncio.wait_for(push_to_another_group(server.client()), timeout=300))


def test_what_a_server_s_loader_says_is_an_error_and_the_server_continues(client, policy):
    coordinator = RankCoordinator(120.0)
    wrong, right = (DirectTransport([client], 1, policy.world, coordinator, deadline_s=60) for _ in range(2))
    asked = exporter(policy, wrong)
    # The server's model has no such tensor, nor one of such a shape.
    asked.gatherer.shapes = asked.gatherer.shapes | {"model.norm.weight": (3,)}

    async def push():
        async with client:
            with pytest.raises(CannotReceive, match=r"policy-0 .*could not join weights: .*; set sync\.transport to b"):
                await wrong.push(asked, "v1", SyncTimes())
            await client.reset(deadline_s=60)
            await right.push(exporter(policy, right), "v2", SyncTimes())
            held, info = await client.checksums(), await client.info()
            await right.close()
            return held, info["weight_version"]

    assert asyncio.run(asyncio.wait_for(push(), timeout=300)) == ((checksums(tensors(policy), tied=False),), "v2")


class DyingServer:
    """In place of a client: a server that dies when it is asked to join a group."""

    url, name = "http://127.0.0.1:9", "dying"

    async def begin_weight_update(self, **_):
        return None

    async def loaders(self):
        return [LOADER]

    async def join(self, *_, **settings):
        await asyncio.sleep(1.0)
        raise ServerError("dying is dead")

    init_weights_group = update_from_tensor = join


@pytest.mark.parametrize("kind", [BroadcastTransport, DirectTransport])
def test_a_server_that_waits_for_one_that_died_is_free_at_once(client, policy, kind):
    transport = kind([client, DyingServer()], 1, policy.world, RankCoordinator(120.0), deadline_s=60)

    async def push():
        async with client:
            with pytest.raises(ServerError, match="dying is dead"):
                await transport.push(exporter(policy, transport), "v1", SyncTimes())
            started = time.monotonic()
            await client.reset(deadline_s=60)
            return time.monotonic() - started

    # Of 60 s.
    assert asyncio.run(push()) < 40


class AbsentServer:
    """In place of a client: a server that does not come, and answers nothing from then on."""

    url, name = "http://127.0.0.1:9", "absent"

    async def begin_weight_update(self, **_):
        return None

    async def loaders(self):
        return [LOADER]

    async def init_weights_group(self, *, backend, deadline_s, **settings):
        # Over NCCL a group is formed before anyone has met.
        if backend == "gloo":
            await self.silence(deadline_s=deadline_s)

    async def silence(self, *_, deadline_s, **settings):
        await asyncio.sleep(deadline_s)
        raise ServerError(f"no answer within {deadline_s} s")

    update_from_distributed = update_from_tensor = info = silence


@pytest.mark.parametrize("kind", [BroadcastTransport, DirectTransport])
def test_a_member_that_never_comes_is_an_error_that_names_it_within_the_deadline(policy, kind, monkeypatch):
    # The thread that connects the group stays blocked, as it does over NCCL.
    monkeypatch.setenv("NCCL_LIKE_PATIENCE_S", "")
    monkeypatch.setattr("exprl_megatron.weight_sync.weight_groups.CAUSE_S", 1.0)
    transport = kind([AbsentServer()], 1, policy.world, RankCoordinator(120.0), deadline_s=3)
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"^absent \(http.*:9\) did not join the .* sync.deadline_s \(3 s\)"):
        asyncio.run(transport.push(exporter(policy, transport), "v1", SyncTimes()))
    # Of the 120 s that ranks wait for each other.
    assert time.monotonic() - started < 60


def test_a_sending_that_fails_frees_the_servers(client, policy, monkeypatch):
    transport = DirectTransport([client], 1, policy.world, RankCoordinator(120.0), deadline_s=60)
    failed = Future()
    failed.set_exception(RuntimeError("connection lost"))

    async def push():
        async with client:
            await transport.push(exporter(policy, transport), "v1", SyncTimes())
            monkeypatch.setattr(transport, "_begin_to_send", lambda exporter: failed)
            with pytest.raises(ServerError, match=r"policy-0 .*could not receive weights"):
                await transport.push(exporter(policy, transport), "v2", SyncTimes())
            started = time.monotonic()
            await client.reset(deadline_s=60)
            return time.monotonic() - started, (await client.info())["weight_version"]

    free_s, version = asyncio.run(push())
    assert free_s < 40 and version == "v1"


def test_a_server_without_the_loader_is_not_asked_to_use_it(client, policy, monkeypatch):
    monkeypatch.setattr("exprl_megatron.weight_sync.direct.LOADER", "another.loader")
    transport = DirectTransport([client], 1, policy.world, RankCoordinator(120.0), deadline_s=60)

    async def push():
        async with client:
            try:
                await transport.push(exporter(policy, transport), "v1", SyncTimes())
            finally:
                await client.reset(deadline_s=60)

    with pytest.raises(UserError, match=r"policy-0 .* was started without --custom-weight-loader another\.loader"):
        asyncio.run(push())


@pytest.mark.parametrize("refusal", ["another loader", "a loader that cannot be followed"])
def test_a_server_that_cannot_receive_shards_gets_broadcasts(client, policy, other, monkeypatch, refusal):
    said = []
    transport = AutoTransport([client], 1, policy.world, RankCoordinator(120.0), 60, log=said.append)
    leaving = exporter(policy, transport)
    if refusal == "another loader":
        monkeypatch.setattr("exprl_megatron.weight_sync.direct.LOADER", "another.loader")
    else:
        # Shapes that no parameter of the server has: its loader raises while it is traced.
        shapes = {name: [2 * size for size in shape] for name, shape in leaving.gatherer.shapes.items()}
        monkeypatch.setattr(leaving.gatherer, "shapes", shapes)
    tokens, versions, _, times = asyncio.run(pushed(client, transport, policy, "v1", leaving))
    assert tokens == greedy(other) and versions == {"v1"}
    assert times.moved == leaving.nbytes
    assert len(said) == 1 and "policy-0" in said[0] and "by broadcast, not by direct" in said[0]


def test_a_missing_directory_is_refused_with_the_servers_words(client, tmp_path):
    async def update():
        async with client:
            await client.update_from_disk(tmp_path / "nowhere", "v2")

    with pytest.raises(ServerError, match="policy-0"):
        asyncio.run(update())
