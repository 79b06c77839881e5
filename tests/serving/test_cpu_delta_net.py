"""Gated delta nets and gated attention in servers on a CPU, against transformers' layers of Qwen3.5."""

import sys

import pytest
import torch
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5GatedDeltaNet,
    Qwen3_5RMSNorm,
    Qwen3_5RMSNormGated,
    causal_conv1d_update,
)

from exprl_megatron.serving.server_command import CPU_BACKEND

KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM, KERNEL = 2, 4, 8, 6, 4
KEYS, VALUES = KEY_HEADS * KEY_DIM, VALUE_HEADS * VALUE_DIM
CHANNELS = 2 * KEYS + VALUES
SLOTS = 9


@pytest.fixture(scope="module")
def kernels():
    """The module in place of SGLang's kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(CPU_BACKEND)
        import exprl_cpu_delta_net

        yield exprl_cpu_delta_net
    del sys.modules["exprl_cpu_delta_net"]


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        hidden_size=20,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=KEY_HEADS,
        linear_num_value_heads=VALUE_HEADS,
        linear_key_head_dim=KEY_DIM,
        linear_value_head_dim=VALUE_DIM,
        linear_conv_kernel_dim=KERNEL,
    )
    layer = Qwen3_5GatedDeltaNet(config, 0).float()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter.data, 0.0, 0.4)
    return layer.requires_grad_(False)


class Server:
    """The layer as SGLang calls the kernels: requests have slots, which it clears when a request gets one."""

    def __init__(self, kernels, layer):
        self.kernels, self.layer = kernels, layer
        # What earlier requests left.
        self.conv = torch.randn(SLOTS, CHANNELS, KERNEL - 1)
        self.states = torch.randn(SLOTS, VALUE_HEADS, VALUE_DIM, KEY_DIM)

    def extend(self, slots, parts, cached):
        """New tokens [tokens, hidden] of several requests after `cached` ones; what the layer makes of each."""
        for slot, before in zip(slots, cached, strict=True):
            if not before:
                # The convolution's slot is not: its kernel knows which requests have no prefix.
                self.states[slot] = 0
        qkv, gate, beta, alpha = self._projected(torch.cat(parts))
        starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0).int()
        indices = torch.tensor(slots).int()
        mixed = self.kernels.convolve(
            qkv.T,
            self.layer.conv1d.weight[:, 0],
            None,
            activation="silu",
            conv_states=self.conv,
            has_initial_state=torch.tensor(cached) > 0,
            cache_indices=indices,
            query_start_loc=starts,
            seq_lens_cpu=[len(part) for part in parts],
        ).T
        decay, opened = self.kernels.gates(self.layer.A_log, alpha, beta, self.layer.dt_bias)
        output, _, _ = self.kernels.read_prompts(
            *self._heads(mixed),
            g=decay,
            beta=opened,
            initial_state=self.states,
            initial_state_indices=indices,
            cu_seqlens=starts,
            head_first=False,
            use_qk_l2norm_in_kernel=True,
        )
        return self._out(output, gate).split([len(part) for part in parts])

    def decode(self, slots, tokens):
        """One new token of each request."""
        qkv, gate, beta, alpha = self._projected(tokens)
        indices = torch.tensor(slots).int()
        weight = self.layer.conv1d.weight[:, 0]
        mixed = self.kernels.convolve_next(qkv, self.conv, weight, None, "silu", conv_state_indices=indices)
        output = self.kernels.read_next(
            A_log=self.layer.A_log,
            dt_bias=self.layer.dt_bias,
            **dict(zip("qkv", self._heads(mixed), strict=True)),
            a=alpha,
            b=beta,
            initial_state_source=self.states,
            initial_state_indices=indices,
            cu_seqlens=torch.arange(len(slots) + 1),
            use_qk_l2norm_in_kernel=True,
            softplus_beta=1.0,
            softplus_threshold=20.0,
        )
        return self._out(output, gate)

    def _projected(self, x):
        qkvz = torch.cat((self.layer.in_proj_qkv(x), self.layer.in_proj_z(x)), -1)
        ba = torch.cat((self.layer.in_proj_b(x), self.layer.in_proj_a(x)), -1)
        return self.kernels.split_projection(qkvz, ba, KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM)

    def _heads(self, mixed):
        query, key, value = mixed.split((KEYS, KEYS, VALUES), -1)
        return (
            query.reshape(1, -1, KEY_HEADS, KEY_DIM),
            key.reshape(1, -1, KEY_HEADS, KEY_DIM),
            value.reshape(1, -1, VALUE_HEADS, VALUE_DIM),
        )

    def _out(self, output, gate):
        flat = output.reshape(-1, VALUE_DIM)
        gate = gate.reshape(-1, VALUE_DIM)
        normed = self.kernels.norm_of_output(
            flat, self.layer.norm.weight, None, z=gate, eps=self.layer.norm.variance_epsilon, is_rms_norm=True
        )
        return self.layer.out_proj(normed.reshape(-1, VALUES))


def test_prompts_chunks_and_decoding_of_many_requests_are_transformers_layer_of_each_alone(kernels, layer):
    """Prompts over a chunk of the rule and shorter than the convolution; a slot's next request sees nothing of it."""
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 2, 3, 3, 70, 70, 130, 5]
    requests = [torch.randn(length + 12, 20, generator=generator) for length in lengths]
    expected = [layer(request[None])[0] for request in requests]
    server = Server(kernels, layer)
    slots = [4, 1, 7, 2, 8, 3, 5, 6]

    def check(numbers, begin, found):
        for number, part in zip(numbers, found, strict=True):
            assert torch.allclose(part, expected[number][begin[number] :][: len(part)], atol=2e-5)
            begin[number] += len(part)

    begin = [0] * len(requests)
    # A prompt in three chunks, of which the second has one token, then others at once; the last one comes late.
    for numbers, sizes in ([6], [40]), ([6, 0, 1, 2, 3], [1, 1, 2, 3, 3]), ([6, 4, 5], [89, 70, 70]):
        parts = [requests[n][begin[n] : begin[n] + size] for n, size in zip(numbers, sizes, strict=True)]
        found = server.extend([slots[n] for n in numbers], parts, [begin[n] for n in numbers])
        check(numbers, begin, found)
    for step in range(12):
        if step == 6:
            check([7], begin, server.extend([slots[7]], [requests[7][:5]], [0]))
        numbers = [n for n in (3, 0, 6, 1, 5, 2, 4, 7) if step >= 6 or n != 7]
        tokens = torch.stack([requests[n][begin[n]] for n in numbers])
        check(numbers, begin, server.decode([slots[n] for n in numbers], tokens)[:, None])
    again = server.extend([slots[6]], [requests[4][:70]], [0])
    assert torch.allclose(again[0], expected[4][:70], atol=2e-5)


def test_a_convolution_has_a_bias_and_an_activation_where_it_is_given_them(kernels):
    torch.manual_seed(3)
    state, x = torch.randn(3, 5, KERNEL - 1), torch.randn(3, 5)
    weight, bias = torch.randn(5, KERNEL), torch.randn(5)
    for activation in ("silu", None):
        theirs, ours, prompt = state.clone(), state.clone(), state.clone()
        expected = causal_conv1d_update(x[..., None], theirs, weight, bias, activation)[..., 0]
        order = torch.tensor([0, 1, 2])
        found = kernels.convolve_next(x, ours, weight, bias, activation, conv_state_indices=order)
        same = kernels.convolve(
            x.T, weight, bias, activation, conv_states=prompt, has_initial_state=torch.ones(3, dtype=torch.bool),
            cache_indices=order, query_start_loc=torch.arange(4), seq_lens_cpu=[1, 1, 1],
        ).T  # fmt: skip
        for output, kept in ((found, ours), (same, prompt)):
            assert torch.allclose(output, expected, atol=1e-6) and torch.equal(kept, theirs)
    with pytest.raises(ValueError, match="activation gelu is not computed"):
        kernels.convolve_next(x, state, weight, bias, "gelu", conv_state_indices=order)


def test_norms_of_heads_multiply_by_1_plus_their_weight_and_gates_are_beside_queries(kernels):
    torch.manual_seed(4)
    tokens, heads, groups, dim = 5, 4, 2, 8
    both, key = torch.randn(tokens, heads * 2 * dim), torch.randn(tokens, groups * dim)
    norms = [Qwen3_5RMSNorm(dim, eps=1e-5) for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    weights = [norm.weight.detach() for norm in norms]
    query, gate = both.view(tokens, heads, 2 * dim).chunk(2, dim=-1)
    found = kernels.normed_heads_and_gates(both, key, *weights, 1e-5, dim, heads)
    expected = norms[0](query).detach(), norms[1](key.view(tokens, groups, dim)).detach(), gate
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.is_contiguous() and torch.allclose(ours, theirs.reshape(-1, dim), atol=1e-6)
    apart = kernels.normed_heads(query, key, *weights, 1e-5, dim)
    assert all(torch.equal(one, other) for one, other in zip(apart, found, strict=False))
    output = torch.randn(tokens, heads * dim)
    opened = output * torch.sigmoid(gate.reshape(tokens, -1))
    kernels.open_gates(output, gate)
    assert torch.allclose(output, opened, atol=1e-6)


def test_the_norm_behind_a_gated_delta_net_multiplies_by_its_weight_and_then_by_the_gate(kernels):
    torch.manual_seed(5)
    norm = Qwen3_5RMSNormGated(VALUE_DIM, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    x, gate = torch.randn(7, VALUE_DIM), torch.randn(7, VALUE_DIM)
    settings = {"z": gate, "eps": 1e-5, "is_rms_norm": True}
    found = kernels.norm_of_output(x, norm.weight.detach(), None, **settings)
    assert torch.allclose(found, norm(x, gate).detach(), atol=1e-6)
    for other in ({"norm_before_gate": False}, {"is_rms_norm": False}, {"group_size": 2}, {"z": None}):
        with pytest.raises(ValueError, match="the norm behind a gated delta net"):
            kernels.norm_of_output(x, norm.weight.detach(), None, **settings | other)
