"""Gated delta net layers: Megatron's own on CUDA, with flash-linear-attention's kernels, and one in torch elsewhere."""

from itertools import groupby
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.gated_delta_net import common
from megatron.core.ssm.gated_delta_net.gdn import GatedDeltaNet
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.delta_net import CHUNK
from exprl_megatron.models.layer_types import LINEAR
from exprl_megatron.policy.attention import split_runs
from exprl_megatron.utils.gated_delta_rule import gated_delta_rule, of_length_one


def delta_net_settings(architecture: Architecture) -> dict[str, Any]:
    """Return Megatron's settings for layers with a gated delta net; none for a model without."""
    net = architecture.delta_net
    if net is None:
        return {}
    types = architecture.layer_types or (LINEAR,) * architecture.layers
    return {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [int(kind == LINEAR) for kind in types],
        "linear_conv_kernel_dim": net.kernel,
        "linear_key_head_dim": net.key_dim,
        "linear_value_head_dim": net.value_dim,
        "linear_num_key_heads": net.key_heads,
        "linear_num_value_heads": net.value_heads,
    }


def cuda_block(config: TransformerConfig, stage: int | None) -> TransformerBlockSubmodules:
    """Return decoder layers of Transformer Engine, with Megatron's gated delta nets where the config has any."""
    if config.experimental_attention_variant is None:
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=stage)
    block = get_transformer_block_with_experimental_attention_variant_spec(config, vp_stage=stage)
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention
        if attention.module is GatedDeltaNet:
            attention.module = Fp32DecayNet
            # Transformer Engine's norm would take the weight for zero-centered, as the others are.
            attention.submodules.out_norm = PlainRMSNorm
    return block


class PlainRMSNorm(torch.nn.RMSNorm):
    """The norm of a gated delta net's output, which multiplies by its weight even where other norms add 1 to theirs.

    Each tensor-parallel rank applies it to its own heads, so its gradient is the sum over the ranks. Megatron 0.19.2
    sums that of no such norm without sequence parallelism (finalize_model_grads.py), so it is done here.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        if config.tensor_model_parallel_size > 1:
            self.weight.register_hook(_summed_over_heads)


class Fp32DecayNet(GatedDeltaNet):
    """Megatron's layer, with the logarithm of the decay rate in fp32 as the servers and published weights have it."""

    A_log: torch.nn.Parameter

    def __init__(self, config: TransformerConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.A_log = _decay_parameter(self.A_log)


class LocalGatedDeltaNet(GatedDeltaNet):
    """The same layer without CUDA and flash-linear-attention.

    The sequences of a packed row each begin with an empty state and convolution; neighbors of the same length are
    computed together. Each is padded on its right, so causality alone keeps padding out of real tokens.
    """

    A_log: torch.nn.Parameter

    def __init__(self, config: TransformerConfig, *args, **kwargs):
        # Megatron's constructor demands the kernels, which this forward pass does not use.
        common.HAVE_FLA = True
        super().__init__(config, *args, **kwargs)
        self.A_log = _decay_parameter(self.A_log)

    def _setup_variant_attrs(self) -> None:
        super()._setup_variant_attrs()
        self.gated_delta_rule = gated_delta_rule

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **_,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states: [sequence, batch, hidden]; returns the same, and no bias."""
        projected, _bias = self.in_proj(hidden_states)
        if packed_seq_params is None:
            mixed = self._of_like_length(projected.transpose(0, 1)).transpose(0, 1)
        else:
            lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
            runs = [(length, len(list(run))) for length, run in groupby(lengths)]
            parts = [self._of_like_length(run).flatten(0, 1) for run in split_runs(projected.squeeze(1), runs)]
            mixed = (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(1)
        return self.out_proj(mixed)

    def _of_like_length(self, projected: torch.Tensor) -> torch.Tensor:
        """Compute sequences of one length: [count, length, projected] -> [count, length, value heads x value_dim]."""
        qkv, gate, beta, alpha = projected.split(self.feat_dim_split, dim=-1)
        query, key, value = self._convolved(qkv).split(
            (self.qk_dim_local_tp, self.qk_dim_local_tp, self.v_dim_local_tp), dim=-1
        )
        repeats = self.num_value_heads // self.num_key_heads
        query, key = (
            of_length_one(tensor.unflatten(-1, (-1, self.key_head_dim))).repeat_interleave(repeats, dim=2)
            for tensor in (query, key)
        )
        value = value.unflatten(-1, (-1, self.value_head_dim))
        decay = -self.A_log.exp() * torch.nn.functional.softplus(alpha.float() + self.dt_bias)
        read, _state = gated_delta_rule(query, key, value, decay, beta.sigmoid(), chunk=CHUNK)
        read = read.to(value.dtype)
        opened = torch.nn.functional.silu(gate.unflatten(-1, (-1, self.value_head_dim)).float())
        return (self.out_norm(read) * opened).to(value.dtype).flatten(2)

    def _convolved(self, qkv: torch.Tensor) -> torch.Tensor:
        """Return the causal convolution, channel by channel, of [count, length, channels]."""
        channels, length = qkv.mT, qkv.shape[1]
        padding = self.conv_kernel_dim - 1
        mixed = torch.nn.functional.conv1d(channels, self.conv1d.weight, padding=padding, groups=channels.shape[1])
        return torch.nn.functional.silu(mixed[..., :length]).mT


def _summed_over_heads(gradient: torch.Tensor) -> torch.Tensor:
    summed = gradient.clone()
    torch.distributed.all_reduce(summed, group=parallel_state.get_tensor_model_parallel_group())
    return summed


def _decay_parameter(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """Return a parameter like `parameter` in fp32, cut as it is."""
    made = torch.nn.Parameter(parameter.detach().float())
    for name in ("tensor_model_parallel", "partition_dim"):
        setattr(made, name, getattr(parameter, name))
    return made
