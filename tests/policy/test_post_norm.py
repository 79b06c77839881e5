"""A norm over all heads of which each rank has some: two ranks, one after the other, against torch's own norm."""

import pytest
import torch

from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.policy import post_norm
from exprl_megatron.policy.attention import CausalAttention
from exprl_megatron.policy.local_spec import RMSNorm
from exprl_megatron.policy.model import build_chunks, transformer_config
from exprl_megatron.policy.post_norm import one_table, two_tables

TOKENS, HEADS, KEY_HEADS, DIM, EPS = 5, 4, 2, 8, 1e-3


class Group:
    """Of two ranks."""

    def size(self):
        return 2


def whole(heads):
    """States and weights of all heads, what is done with the norm, and what torch's norm makes of it."""
    torch.manual_seed(heads)
    states, grad = torch.randn(TOKENS, 2, heads * DIM, requires_grad=True), torch.randn(TOKENS, 2, heads * DIM)
    weight = torch.randn(heads * DIM, requires_grad=True)
    normed = torch.nn.functional.rms_norm(states, (heads * DIM,), weight, EPS)
    normed.backward(grad)
    return states, weight, grad, normed


def part(tensor, rank):
    """The rank's half of the last dimension, [..., heads, DIM]."""
    return tensor.detach().chunk(2, -1)[rank].unflatten(-1, (-1, DIM))


@pytest.mark.parametrize("rank", [0, 1])
def test_queries_and_keys_are_normalized_by_all_ranks_heads_by_one_sum_forward_and_one_backward(monkeypatch, rank):
    wholes = whole(HEADS), whole(KEY_HEADS)
    summed = []
    for states, weight, grad, _ in wholes:
        inverse = 1 / (states.square().mean(-1, keepdim=True) + EPS).sqrt()
        summed.append((states.square(), grad * weight * states * inverse))
    # What the other rank adds: the sums of its squares, then of its gradients' products with what it normalized.
    others = [
        torch.stack([part(of_both, 1 - rank).sum((-2, -1), keepdim=True) for of_both in both])
        for both in zip(*summed, strict=True)
    ]

    def all_reduce(totals, group):
        assert isinstance(group, Group)
        totals += others.pop(0)

    monkeypatch.setattr(post_norm.torch.distributed, "all_reduce", all_reduce)
    mine = [part(states, rank).requires_grad_() for states, *_ in wholes]
    weights = [part(weight, rank).requires_grad_() for _, weight, *_ in wholes]
    found = post_norm.whole_width_norms(mine, weights, EPS, Group())
    torch.autograd.backward(found, [part(grad, rank) for _, _, grad, _ in wholes])
    assert others == [], "two collectives"
    for (states, weight, _, normed), own, own_weight, one in zip(wholes, mine, weights, found, strict=True):
        assert torch.allclose(one, part(normed, rank), atol=1e-6)
        assert torch.allclose(own.grad, part(states.grad, rank), atol=1e-6)
        assert torch.allclose(own_weight.grad, part(weight.grad, rank), atol=1e-5)


def test_a_layer_calls_both_norms_so_that_hooks_run_before_their_weights_are_read(tiny_model, world):
    (chunk,) = build_chunks(read_architecture(tiny_model("olmo3")), PolicyConfig(model="none"), world)
    attention, called = chunk.decoder.layers[0].self_attention, []
    for norm in (attention.q_norm, attention.k_norm):
        norm.register_forward_pre_hook(lambda module, inputs: called.append(module))
    attention.get_query_key_value_tensors(torch.zeros(3, 1, chunk.config.hidden_size))
    assert called == [attention.q_norm, attention.k_norm]


def test_weights_are_shards_of_which_each_rank_has_others(tiny_model, world):
    """Else the gradient's norm would count one rank's alone, or Megatron sum their gradients over ranks."""
    architecture = read_architecture(tiny_model("olmo3"))
    config = PolicyConfig(model="none", layout=Layout())
    (chunk,) = build_chunks(architecture, config, world)
    assert not chunk.config.qk_layernorm
    attention = chunk.decoder.layers[0].self_attention
    for norm in (attention.q_norm, attention.k_norm):
        assert norm.weight.tensor_model_parallel
        assert not getattr(norm.weight, "sequence_parallel", False)
    for norm in (attention.linear_proj.post_layernorm, chunk.decoder.layers[0].mlp.linear_fc2.post_layernorm):
        assert not getattr(norm.weight, "tensor_model_parallel", False)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_norms_behind_a_layer_see_a_part_of_the_tokens_under_sequence_parallelism(tiny_model, world, sequence_parallel):
    architecture = read_architecture(tiny_model("olmo3"))
    layout = Layout(tp=2, sequence_parallel=sequence_parallel)
    megatron = transformer_config(architecture, PolicyConfig(model="none", layout=layout), torch.device("cpu"))
    assert (megatron.window_size, megatron.window_attn_skip_freq) == ((7, 0), [1, 0])
    assert RMSNorm(megatron, 64).weight.sequence_parallel == sequence_parallel


@pytest.mark.parametrize("functions", [2, 4])
def test_each_kind_of_layer_takes_its_own_table(functions):
    full, window = torch.rand(3), torch.rand(3)
    both = torch.cat([two_tables(full, window) * (k + 1) for k in range(functions)])[None, None, None]
    for number, frequencies in enumerate((full, window)):
        expected = torch.cat([frequencies * (k + 1) for k in range(functions)])
        assert torch.equal(one_table(both, number, 3), expected[None, None, None])


def test_windows_and_yarn_s_factor_are_those_of_the_kind_of_layer(tiny_model, world):
    architecture = read_architecture(tiny_model("olmo3", layers=4))
    (chunk,) = build_chunks(architecture, PolicyConfig(model="none"), world)
    attentions = [layer.self_attention.core_attention for layer in chunk.decoder.layers]
    assert all(isinstance(attention, CausalAttention) for attention in attentions)
    assert [attention.window for attention in attentions] == [8, None, 8, None]
    scales = [attention.softmax_scale for attention in attentions]
    assert scales[0] is None and scales[1] == pytest.approx(architecture.attention_factor**2 / 4)
