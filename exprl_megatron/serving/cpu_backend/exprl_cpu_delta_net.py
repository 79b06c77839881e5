"""Gated delta net layers and gated attention of Qwen3.5 in plain torch, for the kernels that SGLang calls on a CPU.

A request's states are in a slot of SGLang's pools: the last inputs of the convolution, [slots, channels, kernel - 1],
and the matrix of each head, [slots, value heads, value_dim, key_dim]. SGLang clears a slot when a request gets it.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch.nn.functional import conv1d, silu, softplus

from exprl_megatron.utils.gated_delta_rule import gated_delta_rule, of_length_one


def split_projection(
    qkvz: torch.Tensor, ba: torch.Tensor, key_heads: int, value_heads: int, key_dim: int, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the input of the convolution, output gates [tokens, value heads, value_dim], betas and alphas [tokens,
    heads].
    """
    qkv, gate = qkvz.split((2 * key_heads * key_dim + value_heads * value_dim, value_heads * value_dim), dim=-1)
    beta, alpha = ba.split(value_heads, dim=-1)
    gate = gate.unflatten(-1, (value_heads, value_dim))
    return qkv.contiguous(), gate.contiguous(), beta.contiguous(), alpha.contiguous()


def gates(
    log_decay: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logarithms of a state's decay and the written share of a value: fp32 [1, tokens, value heads] each."""
    decay = -log_decay.float().exp() * softplus(alpha.float() + bias.float())
    return decay[None], beta.float().sigmoid()[None]


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    *,
    conv_states: torch.Tensor,
    has_initial_state: torch.Tensor,
    cache_indices: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens_cpu: Sequence[int],
) -> torch.Tensor:
    """Convolve new tokens of several requests, one after another in x [channels, tokens]; returns the same shape.

    The slots of `conv_states` are read where `has_initial_state`, and written. `weight` is [channels, kernel].
    """
    kept = conv_states.shape[-1]
    before = conv_states[cache_indices.long()].to(x.dtype) * has_initial_state[:, None, None].to(x.dtype)
    found, after = [], []
    for own, tokens in zip(before, x.split(query_start_loc.diff().tolist(), dim=-1), strict=True):
        joined = torch.cat((own, tokens), dim=-1)
        found.append(conv1d(joined, weight[:, None], bias, groups=len(weight)))
        after.append(joined[:, -kept:])
    conv_states[cache_indices.long()] = torch.stack(after).to(conv_states.dtype)
    return _activated(torch.cat(found, dim=-1), activation)


def convolve_next(
    x: torch.Tensor,
    conv_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    *,
    conv_state_indices: torch.Tensor,
) -> torch.Tensor:
    """Convolve one new token of each request, x [requests, channels], and advance the slots; returns the same shape."""
    slots = conv_state_indices.long()
    joined = torch.cat((conv_states[slots].to(x.dtype), x[..., None]), dim=-1)
    conv_states[slots] = joined[..., 1:].to(conv_states.dtype)
    found = (joined * weight).sum(-1)
    return _activated(found if bias is None else found + bias, activation)


def _activated(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    if activation not in ("silu", "swish", None):
        raise ValueError(f"a convolution with the activation {activation} is not computed on a CPU")
    return silu(x) if activation else x


def read_prompts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    initial_state: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    head_first: bool,
    use_qk_l2norm_in_kernel: bool,
) -> tuple[torch.Tensor, None, None]:
    """Apply the gated delta rule to new tokens of several requests; reads and writes the slots of `initial_state`.

    q and k [1, tokens, key heads, key_dim], v [1, tokens, value heads, value_dim], g and beta as of `gates`. Returns
    what v is, and nothing in place of states, which are in their slots. Neighbors of one length are computed together.

    Raises:
        ValueError: the rule's settings are not those of Qwen3.5.
    """
    if head_first or not use_qk_l2norm_in_kernel:
        raise ValueError("the gated delta rule on a CPU is that of Qwen3.5")
    query, key = _heads(q[0], v.shape[2]), _heads(k[0], v.shape[2])
    slots, outputs = initial_state_indices.long(), []
    for of_run, first, count, length in _runs(cu_seqlens.diff().tolist()):
        tokens = slice(first, first + count * length)
        q_run, k_run, v_run, decay, opened = (
            tensor[tokens].unflatten(0, (count, length)) for tensor in (query, key, v[0], g[0], beta[0])
        )
        states = initial_state[slots[of_run]].float().mT
        output, states = gated_delta_rule(q_run, k_run, v_run, decay, opened, states)
        initial_state[slots[of_run]] = states.mT.to(initial_state.dtype)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None].to(v.dtype), None, None


def _runs(lengths: Sequence[int]) -> Iterator[tuple[slice, int, int, int]]:
    """Yield, for each run of neighbors of equal length: their place among the requests, first token, count, length."""
    request = token = 0
    for length, run in groupby(lengths):
        count = len(list(run))
        yield slice(request, request + count), token, count, length
        request, token = request + count, token + count * length


def read_next(
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    use_qk_l2norm_in_kernel: bool,
    softplus_beta: float,
    softplus_threshold: float,
) -> torch.Tensor:
    """Read one new token of each request: `a` and `b` are alphas and betas, [requests, value heads].

    More than 7 parameters: SGLang's names and order.
    """
    decay, beta = gates(A_log, a, b, dt_bias)
    query, key = _heads(q[0], v.shape[2]), _heads(k[0], v.shape[2])
    slots = initial_state_indices.long()
    # [requests, heads, value_dim, key_dim]
    states = initial_state_source[slots].float() * decay[0].exp()[..., None, None]
    written = (v[0].float() - (states @ key[..., None])[..., 0]) * beta[0][..., None]
    states = states + written[..., None] * key[..., None, :]
    initial_state_source[slots] = states.to(initial_state_source.dtype)
    return ((states @ query[..., None])[..., 0] * q.shape[-1] ** -0.5)[None].to(v.dtype)


def _heads(x: torch.Tensor, value_heads: int) -> torch.Tensor:
    """Normalize [tokens, key heads, key_dim] of any length to fp32 [tokens, value heads, key_dim] of length 1."""
    return of_length_one(x).repeat_interleave(value_heads // x.shape[1], dim=1)


def norm_of_output(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "swish",
) -> torch.Tensor:
    """Replace SGLang's layernorm_fn: return the norm of a layer's output, times its gate.

    x and z [..., value_dim]. More than 7 parameters: SGLang's.

    Raises:
        ValueError: the norm's settings are not those of Qwen3.5.
    """
    if bias is not None or group_size is not None or z is None or not (norm_before_gate and is_rms_norm):
        raise ValueError("the norm behind a gated delta net on a CPU is that of Qwen3.5")
    normed = torch.nn.functional.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps)
    return (normed * _activated(z.float(), activation)).to(x.dtype)


def normed_heads(
    q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norms that multiply by 1 + their weight, of each head of queries and keys: [tokens x heads, head_dim]
    each.
    """
    return _normed(q.reshape(-1, head_dim), q_weight, eps), _normed(k.reshape(-1, head_dim), k_weight, eps)


def normed_heads_and_gates(
    q_gate: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    head_dim: int,
    num_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `normed_heads` and the gates, where q_gate has each head's query and gate side by side."""
    query, gate = q_gate.reshape(-1, num_heads, 2, head_dim).unbind(2)
    return *normed_heads(query, k, q_weight, k_weight, eps, head_dim), gate.contiguous().flatten(0, 1)


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x.float(), (x.shape[-1],), 1 + weight.float(), eps).to(x.dtype)


def open_gates(x: torch.Tensor, gate: torch.Tensor) -> None:
    """Multiply attention's output x [tokens, heads x head_dim] by the sigmoid of its gates, in place."""
    x.mul_(gate.reshape(x.shape).float().sigmoid().to(x.dtype))


OPERATIONS = {
    "fused_gdn_gating_cpu(Tensor A_log, Tensor a, Tensor b, Tensor dt_bias) -> (Tensor, Tensor)": gates,
    "fused_qk_gemma_rmsnorm_cpu(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps, int head_dim) "
    "-> (Tensor, Tensor)": normed_heads,
    "fused_qk_gemma_rmsnorm_with_gate_cpu(Tensor q_gate, Tensor k, Tensor q_weight, Tensor k_weight, float eps, "
    "int head_dim, int num_heads) -> (Tensor, Tensor, Tensor)": normed_heads_and_gates,
    "fused_qkvzba_split_reshape_cat_contiguous_cpu(Tensor qkvz, Tensor ba, int key_heads, int value_heads, "
    "int key_dim, int value_dim) -> (Tensor, Tensor, Tensor, Tensor)": split_projection,
    "fused_sigmoid_gating_delta_rule_update_cpu(Tensor A_log, Tensor dt_bias, Tensor q, Tensor k, Tensor v, Tensor a, "
    "Tensor b, Tensor(a!) initial_state_source, Tensor initial_state_indices, Tensor cu_seqlens, "
    "bool use_qk_l2norm_in_kernel, float softplus_beta, float softplus_threshold) -> Tensor": read_next,
    "fused_sigmoid_mul_cpu(Tensor(a!) x, Tensor gate) -> ()": open_gates,
}
"""Those of torch.ops.sgl_kernel, by their schema."""
