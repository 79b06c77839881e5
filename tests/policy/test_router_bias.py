"""The bias of a sigmoid router: a buffer that training leaves alone and that nothing forgets."""

import pytest
import torch
from helpers.witness import loss_function, sequences, tokens
from safetensors.torch import load_file

from exprl_megatron.config.policy import OptimizerConfig, PolicyConfig
from exprl_megatron.policy.checkpoint import load_checkpoint, save_checkpoint
from exprl_megatron.policy.named_weights import named_weights
from exprl_megatron.policy.policy import Policy

BATCH = sequences(128)


def biases(policy: Policy) -> list[torch.Tensor]:
    return [weight.clone() for name, weight in named_weights(policy.chunks[0]) if name.endswith("expert_bias")]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) == 2 and all(map(torch.equal, found, expected))


def update(policy: Policy) -> None:
    policy.accumulate(BATCH, loss_function, 0.7, tokens(BATCH))
    policy.apply_update()


@pytest.fixture
def policy(tiny_model, world) -> Policy:
    config = PolicyConfig(
        model=str(tiny_model("glm4-moe", layers=3)), precision="bf16", max_tokens=64, micro_batch_tokens=64
    )
    return Policy(config, seed=0)


@pytest.fixture
def stored(tiny_model) -> list[torch.Tensor]:
    weights = load_file(tiny_model("glm4-moe", layers=3) / "model.safetensors")
    return [weights[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] for layer in (1, 2)]


def test_it_stays_as_it_was_loaded_whatever_is_learned_and_whatever_the_model_is_wrapped_in(policy, stored):
    assert {bias.dtype for bias in biases(policy)} == {torch.float32} and same(biases(policy), stored)
    policy.begin_stage(OptimizerConfig(lr=1e-2), total_steps=2, keep_ref_policy=True)
    update(policy)
    assert same(biases(policy), stored)
    # Another wrapper is made of a model that is built again.
    before = policy.chunks[0]
    policy.begin_stage(OptimizerConfig(lr=1e-2, overlap=True), total_steps=2)
    assert policy.chunks[0] is not before
    update(policy)
    assert same(biases(policy), stored)


def test_a_checkpoint_has_it_of_the_current_weights_and_of_the_reference_policy(policy, stored, tmp_path):
    policy.begin_stage(OptimizerConfig(lr=1e-2), total_steps=2, keep_ref_policy=True)
    save_checkpoint(tmp_path, policy, {}, keep=1)
    with torch.no_grad():
        for name, weight in named_weights(policy.chunks[0]):
            if name.endswith("expert_bias"):
                weight.add_(1.0)
    for weights in policy.stage.ref_weights:
        for name, weight in weights.items():
            if name.endswith("expert_bias"):
                weight.add_(1.0)
    assert not same(biases(policy), stored)
    load_checkpoint(tmp_path / "checkpoint-00000001", policy)
    assert same(biases(policy), stored)
    kept = [weight for name, weight in policy.stage.ref_weights[0].items() if name.endswith("expert_bias")]
    assert same(kept, stored)
