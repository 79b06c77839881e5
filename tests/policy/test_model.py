from pathlib import Path

import pytest
import torch

from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.policy.model import attention_backend, build_chunks


def test_parameter_names_are_those_of_transformer_engines_layers(tiny_model, world):
    model: Path = tiny_model("qwen3")
    chunk = build_chunks(read_architecture(model), PolicyConfig(model=str(model)), world)[0]
    layer = {name.split(".", 3)[3] for name, _ in chunk.named_parameters() if name.startswith("decoder.layers.")}
    assert layer == {
        "self_attention.linear_proj.weight",
        "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_qkv.weight",
        "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    }


def test_a_layout_that_does_not_fit_is_refused_before_anything_is_built(tiny_model, world):
    model = str(tiny_model("qwen3"))
    config = PolicyConfig(model=model, layout=Layout(tp=4, pp=3))
    with pytest.raises(UserError, match=r"2 KV groups; use one of 1, 2.\npolicy.layout.pp x vpp is 3"):
        build_chunks(read_architecture(model), config, world)


@pytest.mark.parametrize(
    ("environment", "dtype", "backend"),
    [
        ({}, torch.bfloat16, "auto"),
        ({"NVTE_FLASH_ATTN_V4": "0"}, torch.bfloat16, "auto"),
        ({"NVTE_FLASH_ATTN": "0"}, torch.bfloat16, "fused"),
        ({"NVTE_FLASH_ATTN": "0"}, torch.float32, "unfused"),
        ({"NVTE_FUSED_ATTN": "0"}, torch.bfloat16, "flash"),
        ({"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "0"}, torch.bfloat16, "unfused"),
    ],
)
def test_the_attention_backend_agrees_with_the_variables_that_the_user_set(environment, dtype, backend):
    assert attention_backend(environment, dtype).name == backend


def test_a_model_is_built_whatever_attention_kernel_the_user_rules_out(tiny_model, world, monkeypatch):
    model = str(tiny_model("qwen3"))
    for name in ("NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        # Megatron sets them; each is as it was when the test ends.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    config = PolicyConfig(model=model, precision=PrecisionConfig(kind="bf16"))
    (chunk,) = build_chunks(read_architecture(model), config, world)
    assert chunk.config.attention_backend.name == "fused"
