"""The gated delta rule and its layer against the recurrence and transformers; what packed rows keep apart."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers.tiny_models import write_tiny_vision_model
from helpers.witness import largest_difference, listed, loss_function, sequences, tokens
from safetensors.torch import load_file
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

from exprl_megatron.config.policy import OptimizerConfig, PolicyConfig
from exprl_megatron.policy import gated_delta_net as module
from exprl_megatron.policy.gated_delta_net import PlainRMSNorm
from exprl_megatron.policy.policy import Policy
from exprl_megatron.utils.gated_delta_rule import gated_delta_rule

BATCH = sequences(128)


@pytest.mark.parametrize("length", [1, 5, 64, 65, 130])
def test_the_rule_in_chunks_is_the_recurrence_token_by_token_also_in_two_parts(length):
    generator = torch.Generator().manual_seed(length)
    query, key = (torch.randn(2, length, 3, 8, generator=generator) for _ in range(2))
    value = torch.randn(2, length, 3, 6, generator=generator)
    query, key = (torch.nn.functional.normalize(tensor, dim=-1) for tensor in (query, key))
    decay = -torch.rand(2, length, 3, generator=generator)
    beta = torch.rand(2, length, 3, generator=generator)
    expected, last = torch_recurrent_gated_delta_rule(query, key, value, g=decay, beta=beta, output_final_state=True)
    found, state = gated_delta_rule(query, key, value, decay, beta)
    assert torch.allclose(found, expected, atol=1e-5) and torch.allclose(state, last, atol=1e-5)
    cut = length // 3
    parts = [
        [tensor[:, part] for tensor in (query, key, value, decay, beta)] for part in (slice(cut), slice(cut, None))
    ]
    first, between = gated_delta_rule(*parts[0]) if cut else (found[:, :0], None)
    second, state = gated_delta_rule(*parts[1], between)
    assert torch.allclose(torch.cat((first, second), dim=1), expected, atol=1e-5)
    assert torch.allclose(state, last, atol=1e-5)


def policy(model: Path, **settings) -> Policy:
    config = {"max_tokens": 64, "micro_batch_tokens": 10_000} | settings
    return Policy(PolicyConfig(model=str(model), **config), seed=0)


def test_sequences_of_a_packed_row_do_not_see_each_other(tiny_model, world):
    learner = policy(tiny_model("qwen3.5"))
    together = listed(learner.log_probs(BATCH, 1.0))
    alone = [listed(learner.log_probs([sample], 1.0))[0] for sample in BATCH]
    assert largest_difference(together, alone) <= 1e-5


@pytest.mark.parametrize("family", ["qwen3.5", "qwen3.5-moe"])
def test_the_language_model_of_a_vision_model_is_transformers_own_and_comes_back_whole(
    tiny_model, world, tmp_path, family
):
    model = write_tiny_vision_model(tmp_path / "vision", tiny_model(family))
    learner = policy(model)
    found = listed(learner.log_probs(BATCH, 1.0))
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(model).eval()
    expected = []
    for sample in BATCH:
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        with torch.no_grad():
            log_probs = theirs(input_ids=ids).logits[0, :-1].log_softmax(-1)
        rows = log_probs.gather(1, ids[0, 1:, None])[sample.prompt_tokens - 1 :, 0]
        expected.append(rows.tolist())
    assert largest_difference(found, expected) <= 1e-4
    learner.save_huggingface(tmp_path / "saved")
    before, after = (
        {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for path in (model, tmp_path / "saved")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "saved/config.json").read_text()) == json.loads((model / "config.json").read_text())


def test_in_bf16_the_decay_rate_stays_in_fp32_through_a_step(tiny_model, world, tmp_path):
    learner = policy(tiny_model("qwen3.5"), precision="bf16")
    name = "decoder.layers.0.self_attention.A_log"
    before = dict(learner.chunks[0].named_parameters())[name].detach().clone()
    stored = load_file(tiny_model("qwen3.5") / "model.safetensors")["model.layers.0.linear_attn.A_log"]
    assert before.dtype == torch.float32 and torch.equal(before, stored)
    learner.begin_stage(OptimizerConfig(lr=1e-3), total_steps=1)
    learner.accumulate(BATCH, loss_function, 1.0, tokens(BATCH))
    learner.apply_update()
    after = dict(learner.chunks[0].named_parameters())[name].detach()
    # Adam's first step has the length of the learning rate, less than a step of bf16 here.
    assert torch.allclose((after - before).abs(), torch.full_like(after, 1e-3), rtol=1e-2)
    learner.save_huggingface(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(saved["model.layers.0.linear_attn.A_log"], after)
    assert {tensor.dtype for key, tensor in saved.items() if not key.endswith("A_log")} == {torch.bfloat16}


@pytest.mark.parametrize(("ranks", "summed"), [(1, 1.0), (2, 3.0)])
def test_the_gradient_of_the_output_norm_is_the_sum_over_the_ranks_that_have_other_heads(monkeypatch, ranks, summed):
    monkeypatch.setattr(module.parallel_state, "get_tensor_model_parallel_group", lambda: "tp")
    others = {"tp": 2.0}
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda gradient, group: gradient.add_(others[group]))
    norm = PlainRMSNorm(SimpleNamespace(params_dtype=torch.float32, tensor_model_parallel_size=ranks), 4, eps=0.0)
    norm(torch.ones(1, 4)).sum().backward()
    assert norm.weight.grad.tolist() == [summed] * 4
