"""Stretched rotary positions in Megatron's model, against transformers; see test_families.py for log-probs."""

import math

import pytest
import torch
import transformers
from helpers.witness import largest_difference, listed, sequences
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from exprl_megatron.config.policy import PolicyConfig
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
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6},
    ],
    ids=str,
)
def test_frequencies_and_attention_factor_are_those_of_transformers(tiny_model, rope):
    architecture = read_architecture(tiny_model("llama", rope=rope))
    config = transformers.AutoConfig.from_pretrained(tiny_model("llama", rope=rope))
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    assert torch.allclose(rope_frequencies(architecture), expected, rtol=1e-6, atol=0.0)
    assert architecture.attention_factor == pytest.approx(factor, rel=1e-12)


def test_without_its_settings_a_stretched_model_is_another_one(tiny_model, world):
    found = []
    for rope in (YARN, LINEAR, {"rope_type": "default"}):
        config = PolicyConfig(model=str(tiny_model("qwen3", rope=rope)), max_tokens=64, micro_batch_tokens=64)
        found.append(listed(Policy(config, seed=0).log_probs(BATCH, 1.0)))
    assert all(largest_difference(found[a], found[b]) > 0.1 for a, b in ((0, 1), (0, 2), (1, 2)))


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
