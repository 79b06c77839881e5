"""A model in bf16 with tensors that stay in fp32: GLM-4.5's router, whose weight servers keep in fp32 as well."""

from pathlib import Path

import pytest
import torch
from helpers.forking import starter

from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.config.serving import ServerConfig, SyncConfig
from exprl_megatron.config.transport import TransportChoice
from exprl_megatron.policy.gather import gather_buckets
from exprl_megatron.policy.named_weights import named_weights
from exprl_megatron.policy.policy import Policy
from exprl_megatron.policy.world import enter_world, leave_world
from exprl_megatron.serving.checksums import ServerChecksums
from exprl_megatron.serving.server_process import ServerSpec, start_servers, stop_servers
from exprl_megatron.serving.static_pool import StaticPool
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.sync import WeightSync
from exprl_megatron.weight_sync.transports import make_transport

pytestmark = pytest.mark.slow
TP = 2
SETTINGS = {"layers": 3, "vocab_size": 131}


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory):
    model = tiny_model("glm4-moe", **SETTINGS)
    config = ServerConfig(tp=TP, max_total_tokens=4096, request_deadline_s=120)
    spec = ServerSpec("wide", model, config, tmp_path_factory.mktemp("logs"), dtype="bfloat16")
    (started,) = start_servers([spec], starter())
    yield started
    stop_servers([started])


@pytest.fixture(scope="module")
def policy(tiny_model):
    enter_world(Layout())
    model = tiny_model("glm4-moe", seed=7, **SETTINGS)
    yield Policy(PolicyConfig(model=str(model), precision="bf16"), seed=0)
    leave_world()


def change(policy: Policy) -> None:
    """All weights, and the router's biases in bits that bf16 does not have."""
    with torch.no_grad():
        for chunk in policy.chunks:
            for _, weight in named_weights(chunk):
                weight.mul_(-1.0001)


def test_every_transport_brings_every_bit_and_both_kinds_of_checksums_agree(server, policy, tmp_path):
    coordinator, client = RankCoordinator(120.0), server.client()
    coordinator.run(client.__aenter__())
    try:
        for kind in ("broadcast", "direct", "handles", "disk", "delta"):
            choice = TransportChoice(kind, "")
            transport = make_transport(
                choice, [client], TP, policy.world, coordinator, 60.0,
                directory=tmp_path / kind, model=Path(policy.config.model),
            )  # fmt: skip
            sync = WeightSync(SyncConfig(bucket_mb=0.04), policy, coordinator, StaticPool([client]), transport, TP)
            # The first delta is all weights.
            for version in (f"{kind}-1", f"{kind}-2")[: 2 if kind == "delta" else 1]:
                change(policy)
                # Raises where the checksums of shards, by the project's loader, differ.
                assert sync.push_weights(version)["sync/gb"] > 0
                buckets = gather_buckets(policy.chunks, policy.architecture, policy.world, 2**30)
                tensors = [pair for bucket in buckets for pair in bucket]
                expected = ServerChecksums(tp=TP, kv_heads=2, experts=4, sigmoid_router=True, tied=False)
                expected.add(tensors)
                assert coordinator.run(client.checksums()) == expected.result(), kind
            sync.close()
    finally:
        coordinator.run(client.__aexit__(None, None, None))
        coordinator.close()
    biases = [tensor for name, tensor in tensors if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    assert not any(torch.equal(bias.bfloat16().float(), bias) for bias in biases)
