"""Every transport to servers of several ranks, of the families that no other test has there.

GLM-4.5 in bf16, whose router's weight and bias servers keep in fp32; Olmo 3, whose norms of queries and keys servers
have whole on every rank; Qwen3.5 in bf16, of whose tensors some are cut in sections, one is in fp32, and norms have a
second copy; its mixture as it is published, with a layer's experts in one tensor, and a gate of the shared expert;
Seed-OSS, which servers have the project's own class for, with biases; Mistral on four ranks, two of which have heads
of zeros alone.
"""

from pathlib import Path

import pytest
import torch
from helpers.forking import starter
from helpers.tiny_models import write_tiny_vision_model
from transformers import AutoModelForCausalLM

from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.config.serving import ServerConfig, SyncConfig
from exprl_megatron.config.transport import TransportChoice
from exprl_megatron.models.delta_net import DeltaNet
from exprl_megatron.policy.gather import gather_buckets
from exprl_megatron.policy.named_weights import named_weights
from exprl_megatron.policy.policy import Policy
from exprl_megatron.policy.world import enter_world, leave_world
from exprl_megatron.serving.checksums import ServerChecksums
from exprl_megatron.serving.server_process import start_servers, stop_servers
from exprl_megatron.serving.server_spec import ServerSpec
from exprl_megatron.serving.static_pool import StaticPool
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.sync import WeightSync
from exprl_megatron.weight_sync.transports import make_transport

pytestmark = pytest.mark.slow
PROMPT = [3 + 7 * index % 120 for index in range(150)]
SETTINGS = {"vocab_size": 131}
LAYERS = {"glm4-moe": 3, "olmo3": 4, "qwen3.5": 4, "qwen3.5-moe": 2, "seed-oss": 2, "mistral": 2}
RANKS = dict.fromkeys(LAYERS, 2) | {"mistral": 4}
DTYPES = dict.fromkeys(LAYERS, "float32") | {"glm4-moe": "bfloat16", "qwen3.5": "bfloat16"}
DELTA_NET = DeltaNet(key_heads=2, value_heads=4, key_dim=16, value_dim=24, kernel=4)
CHECKED = {
    "glm4-moe": {"experts": 4, "sigmoid_router": True},
    "qwen3.5": {"delta_net": DELTA_NET},
    "qwen3.5-moe": {"experts": 4, "delta_net": DELTA_NET},
}
"""What the checksums of a server have to know of its model."""


def model_of(family, seed, tiny_model, tmp_path_factory):
    model = tiny_model(family, seed=seed, layers=LAYERS[family], **SETTINGS)
    if family != "qwen3.5-moe":
        return model
    return write_tiny_vision_model(tmp_path_factory.mktemp("vision"), model)


@pytest.fixture(scope="module")
def servers(tiny_model, tmp_path_factory):
    configs = {
        family: ServerConfig(tp=tp, max_total_tokens=4096, request_deadline_s=120) for family, tp in RANKS.items()
    }
    logs = tmp_path_factory.mktemp("logs")
    specs = [
        ServerSpec(family, model_of(family, 0, tiny_model, tmp_path_factory), config, logs, dtype=DTYPES[family])
        for family, config in configs.items()
    ]
    started = start_servers(specs, starter())
    yield dict(zip(LAYERS, started, strict=True))
    stop_servers(started)


@pytest.fixture(params=LAYERS)
def policy(request, tiny_model, tmp_path_factory):
    enter_world(Layout())
    model = model_of(request.param, 7, tiny_model, tmp_path_factory)
    precision = {"bfloat16": "bf16", "float32": "fp32"}[DTYPES[request.param]]
    yield Policy(PolicyConfig(model=str(model), precision=precision), seed=0)
    leave_world()


def change(policy: Policy) -> None:
    """All weights, and a router's biases in bits that bf16 does not have."""
    with torch.no_grad():
        for chunk in policy.chunks:
            for _, weight in named_weights(chunk):
                weight.mul_(-1.0001)


def test_every_transport_delivers_every_bit_and_both_kinds_of_checksums_agree(servers, policy, tmp_path):
    family = policy.architecture.family
    tp = RANKS[family]
    coordinator, client = RankCoordinator(120.0), servers[family].client()
    coordinator.run(client.__aenter__())
    try:
        for kind in ("broadcast", "direct", "handles", "disk", "delta"):
            choice = TransportChoice(kind, "")
            transport = make_transport(
                choice, [client], tp, policy.world, coordinator, 60.0,
                directory=tmp_path / kind, model=Path(policy.config.model),
            )  # fmt: skip
            sync = WeightSync(SyncConfig(bucket_mb=0.04), policy, coordinator, StaticPool([client]), transport, tp)
            # The first delta is all weights.
            for version in (f"{kind}-1", f"{kind}-2")[: 2 if kind == "delta" else 1]:
                change(policy)
                # Raises where the checksums of shards, by the project's loader, differ.
                assert sync.push_weights(version)["sync/gb"] > 0
                buckets = gather_buckets(policy.chunks, policy.architecture, policy.world, 2**30)
                tensors = [pair for bucket in buckets for pair in bucket]
                expected = ServerChecksums(tp=tp, kv_heads=2, tied=False, **CHECKED.get(family, {}))
                expected.add(tensors)
                assert coordinator.run(client.checksums()) == expected.result(), kind
            sync.close()
        scored = coordinator.run(client.score(PROMPT, 1)).log_probs
    finally:
        coordinator.run(client.__aexit__(None, None, None))
        coordinator.close()
    if DTYPES[family] == "float32":
        policy.save_huggingface(tmp_path / "exported")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
        ids = torch.tensor([PROMPT])
        with torch.no_grad():
            wanted = torch.log_softmax(model(ids).logits[0, :-1], dim=-1).gather(1, ids[0, 1:, None])[:, 0]
        assert (torch.tensor(scored.tolist()) - wanted).abs().max() < 1e-4
        return
    biases = [tensor for name, tensor in tensors if name.endswith(("e_score_correction_bias", "A_log"))]
    assert len(biases) == 2
    assert not any(torch.equal(bias.bfloat16().float(), bias) for bias in biases)
