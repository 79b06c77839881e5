"""Stretched rotary positions in Megatron's model, against transformers; positions lie far past the original length."""

import math

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from witness import expectation, largest_difference, listed, loss_function, sequences, tokens

from exprl_megatron.config.policy import OptimizerConfig, PolicyConfig
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.policy.frequencies import rope_frequencies
from exprl_megatron.policy.model import transformer_config
from exprl_megatron.policy.policy import Policy

LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.5}
"""Of 8 pairs of dimensions the first is kept, some are in between, and some are stretched."""
MODELS = {
    "llama linear": ("llama", LINEAR),
    "llama yarn": ("llama", YARN | {"truncate": False}),
    "qwen2 yarn": ("qwen2", YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}),
    "qwen3 yarn": ("qwen3", YARN),
    "qwen3 linear": ("qwen3", LINEAR),
    "qwen3-moe yarn": ("qwen3-moe", YARN),
}
BATCH = sequences(128)


@pytest.mark.parametrize(
    "rope",
    [
        LINEAR,
        LLAMA3,
        LLAMA3 | {"original_max_position_embeddings": 8192},
        LLAMA3 | {"original_max_position_embeddings": 32},
        YARN,
        YARN | {"truncate": False},
        YARN | {"truncate": False, "beta_fast": 32.0, "original_max_position_embeddings": 4096},
        YARN | {"original_max_position_embeddings": 10**9},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4, "beta_fast": 8},
    ],
    ids=str,
)
def test_frequencies_and_attention_factor_are_those_of_transformers(tiny_model, rope):
    architecture = read_architecture(tiny_model("llama", rope=rope))
    config = transformers.AutoConfig.from_pretrained(tiny_model("llama", rope=rope))
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    assert torch.allclose(rope_frequencies(architecture), expected, rtol=1e-6, atol=0.0)
    assert architecture.attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("model", MODELS)
def test_log_probs_and_gradient_norm_are_those_of_transformers(tiny_model, world, model, packing):
    family, rope = MODELS[model]
    directory = tiny_model(family, rope=rope)
    expected = expectation(directory, BATCH, 0.7)
    plain = Policy(_config(tiny_model(family, rope={"rope_type": "default"}), packing), seed=0)
    assert largest_difference(listed(plain.log_probs(BATCH, 0.7)), expected["log_probs"]) > 0.1
    learner = Policy(_config(directory, packing), seed=0)
    assert largest_difference(listed(learner.log_probs(BATCH, 0.7)), expected["log_probs"]) <= 1e-4
    learner.begin_stage(OptimizerConfig(), total_steps=1)
    loss = learner.accumulate(BATCH, loss_function, 0.7, tokens(BATCH))["loss"]
    assert loss == pytest.approx(expected["loss"], rel=1e-5)
    assert learner.apply_update().grad_norm == pytest.approx(expected["grad_norm"], rel=1e-5)


def _config(directory, packing: bool) -> PolicyConfig:
    return PolicyConfig(model=str(directory), max_tokens=64, micro_batch_tokens=64, packing=packing)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_attention_factor_is_in_the_softmax_where_no_fused_kernel_can_drop_it(tiny_model, device):
    directory = tiny_model("qwen3", rope=YARN)
    config = PolicyConfig(model=str(directory), precision="bf16")
    megatron = transformer_config(read_architecture(directory), config, torch.device(device))
    assert megatron.softmax_scale == pytest.approx((0.1 * math.log(8) + 1) ** 2 / math.sqrt(16), rel=1e-12)
    # Megatron would multiply by its own yarn_* settings a second time.
    assert not [name for name in vars(megatron) if name.startswith("yarn_")]
    plain = transformer_config(read_architecture(tiny_model("qwen3")), config, torch.device(device))
    assert plain.softmax_scale is None
