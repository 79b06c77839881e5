"""The gate of the shared expert in servers on a CPU, against transformers' block of Qwen3.5's mixtures."""

import importlib.util

import pytest
import torch
from transformers import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock

from exprl_megatron.serving.server_command import CPU_BACKEND

TOKENS, HIDDEN = 7, 20


@pytest.fixture(scope="module")
def add_gated():
    spec = importlib.util.spec_from_file_location("shared_expert", CPU_BACKEND / "exprl_cpu_shared_expert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.add_gated


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    config = Qwen3_5MoeTextConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    block = Qwen3_5MoeSparseMoeBlock(config).float()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter.data, 0.0, 0.4)
    return block.requires_grad_(False)


def outputs(block, x):
    """Of routed experts, of the shared one without its gate, and of the whole block: [tokens, hidden] each."""
    _, weights, chosen = block.gate(x)
    return block.experts(x, chosen, weights), block.shared_expert(x), block(x[None])[0]


def test_the_gated_shared_expert_is_added_to_the_routed_ones(add_gated, block):
    x = torch.randn(TOKENS, HIDDEN)
    output, shared, expected = outputs(block, x)
    assert add_gated(x, block.shared_expert_gate.weight[0], shared, output) is None
    assert torch.allclose(output, expected, atol=1e-6)


def test_in_bf16_the_result_alone_is_rounded(add_gated):
    """As in SGLang's kernel, whose numbers are fp32 until they are stored."""
    torch.manual_seed(1)
    x, shared, output = (torch.randn(TOKENS, HIDDEN).bfloat16() for _ in range(3))
    weight = torch.randn(HIDDEN).bfloat16()
    expected = output.double() + shared.double() * (x.double() @ weight.double()).sigmoid()[:, None]
    add_gated(x, weight, shared, output)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected.float().bfloat16())
