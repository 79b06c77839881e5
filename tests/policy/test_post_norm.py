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

TOKENS, HEADS, DIM, EPS = 5, 4, 8, 1e-3


class Group:
    """Of two ranks."""

    def size(self):
        return 2


@pytest.fixture
def whole():
    """States and weights of all heads, what is done with the norm, and what torch's norm makes of it."""
    torch.manual_seed(0)
    states, grad = torch.randn(TOKENS, 2, HEADS * DIM, requires_grad=True), torch.randn(TOKENS, 2, HEADS * DIM)
    weight = torch.randn(HEADS * DIM, requires_grad=True)
    normed = torch.nn.functional.rms_norm(states, (HEADS * DIM,), weight, EPS)
    normed.backward(grad)
    return states, weight, grad, normed


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_s_heads_are_normalized_by_all_and_so_is_their_gradient(monkeypatch, whole, rank):
    states, weight, grad, normed = whole
    own, other = (slice(r * HEADS // 2 * DIM, (r + 1) * HEADS // 2 * DIM) for r in (rank, 1 - rank))
    inverse = 1 / (states.detach().square().mean(-1, keepdim=True) + EPS).sqrt()
    of_gradient = (grad * weight * states * inverse).detach()
    # What the other rank adds: the sum of its squares, then of its gradients' products with what it normalized.
    others = [part[..., other].sum(-1)[..., None, None] for part in (states.detach().square(), of_gradient)]

    def all_reduce(total, group):
        assert isinstance(group, Group)
        total += others.pop(0)

    monkeypatch.setattr(post_norm.torch.distributed, "all_reduce", all_reduce)
    mine = states.detach()[..., own].unflatten(-1, (HEADS // 2, DIM)).requires_grad_()
    weights = weight.detach()[own].requires_grad_()
    found = post_norm._WholeWidthNorm.apply(mine, weights.view(HEADS // 2, DIM), EPS, Group())
    found.backward(grad[..., own].unflatten(-1, (HEADS // 2, DIM)))
    assert others == []
    assert torch.allclose(found.flatten(-2), normed[..., own], atol=1e-6)
    assert torch.allclose(mine.grad.flatten(-2), states.grad[..., own], atol=1e-6)
    assert torch.allclose(weights.grad, weight.grad[own], atol=1e-5)


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
