"""Transformer layers from torch and Megatron's own linear layers, for machines without CUDA.

Parameters bear the names that Transformer Engine's layers have, so that loading, export and checkpoints
know one set of names for both.
"""

from collections.abc import Sequence
from functools import partial

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm.gated_delta_net.common import GatedDeltaNetSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from exprl_megatron.models.architecture import Architecture
from exprl_megatron.policy.attention import CausalAttention
from exprl_megatron.policy.gated_delta_net import LocalGatedDeltaNet, PlainRMSNorm
from exprl_megatron.policy.local_layers import SwiGlu
from exprl_megatron.policy.post_norm import Modules, PostNorm, ScaledWhereStretched


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm that, unlike Megatron's torch norm, supports sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Each tensor-parallel rank then has a part of the tokens, so Megatron must sum these gradients.
        self.weight.sequence_parallel = config.sequence_parallel
        self._zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [..., hidden_size]."""
        return rms_norm(hidden, self.weight, self.eps, self._zero_centered)


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float | None, zero_centered: bool) -> torch.Tensor:
    """Return the root-mean-square norm of [..., weight's size]; `zero_centered` multiplies by 1 + weight, summed in
    fp32.
    """
    if not zero_centered:
        return torch.nn.functional.rms_norm(hidden, weight.shape, weight, eps)
    return torch.nn.functional.rms_norm(hidden.float(), weight.shape, 1 + weight.float(), eps).type_as(hidden)


class PlainProduct:
    """Lets a linear layer multiply by torch's own operation wherever no communication is part of the product.

    Megatron's own autograd function, which hides that communication, costs more than small products themselves.
    """

    def _forward_impl(self, input, weight, bias=None, *, allreduce_dgrad: bool, sequence_parallel: bool, **rest):
        if allreduce_dgrad or sequence_parallel:
            communication = {"allreduce_dgrad": allreduce_dgrad, "sequence_parallel": sequence_parallel}
            return super()._forward_impl(input, weight, bias=bias, **communication, **rest)
        return torch.nn.functional.linear(input, weight, bias)


class RowLinear(PlainProduct, RowParallelLinear):
    """Row-parallel linear layer: its sum over ranks follows the product."""


class ColumnLinear(PlainProduct, ColumnParallelLinear):
    """Column-parallel linear layer."""


class RowLinearWithNorm(PostNorm, RowLinear):
    """Row-parallel linear layer and RMSNorm in one."""

    norm = RMSNorm


class ScaledCausalAttention(ScaledWhereStretched, CausalAttention):
    """Causal attention whose softmax has YaRN's factor by its kind of layer."""


class NormColumnParallelLinear(PlainProduct, ColumnParallelLinear):
    """RMSNorm and column-parallel linear layer in one, as TELayerNormColumnParallelLinear."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel
        self.layer_norm_eps = config.layernorm_epsilon

    def forward(self, hidden: torch.Tensor, *args, **kwargs):
        """hidden: [sequence, batch, input_size]; returns (output, bias or None) as the linear layer does."""
        zero_centered = self.config.layernorm_zero_centered_gamma
        norm = rms_norm(hidden, self.layer_norm_weight, self.layer_norm_eps, zero_centered)
        return super().forward(norm, *args, **kwargs)


POST_NORM = Modules(ColumnLinear, RowLinearWithNorm, ScaledCausalAttention, RMSNorm, SwiGlu)


def local_block(config: TransformerConfig, layers: Sequence[Architecture]) -> TransformerBlockSubmodules:
    """Return decoder layers like those of `layers`, and the final norm (Megatron builds it on the last stage alone)."""
    return TransformerBlockSubmodules(layer_specs=[_layer(config, layer) for layer in layers], layer_norm=RMSNorm)


def _layer(config: TransformerConfig, layer: Architecture) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=_attention(config) if layer.delta_net is None else _delta_net(),
            self_attn_bda=get_bias_dropout_add,
            **(_experts() if layer.experts is not None else _dense_mlp()),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _attention(config: TransformerConfig) -> ModuleSpec:
    qk_norm = RMSNorm if config.qk_layernorm else None
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=NormColumnParallelLinear,
            core_attention=CausalAttention,
            linear_proj=RowLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def _delta_net() -> ModuleSpec:
    return ModuleSpec(
        module=LocalGatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(in_proj=NormColumnParallelLinear, out_norm=PlainRMSNorm, out_proj=RowLinear),
    )


def _dense_mlp() -> dict:
    linear = MLPSubmodules(NormColumnParallelLinear, RowLinear, activation_func=SwiGlu)
    return {"mlp": partial(MLP.as_mlp_submodule, submodules=linear)}


def _experts() -> dict:
    """Return router and experts in place of the MLP; the norm before them is separate, as the router reads it too."""
    linear = MLPSubmodules(ColumnParallelLinear, RowParallelLinear, activation_func=SwiGlu)
    experts = MoESubmodules(
        experts=partial(SequentialMLP, submodules=linear), shared_experts=partial(SharedExpertMLP, submodules=linear)
    )
    return {"pre_mlp_layernorm": RMSNorm, "mlp": partial(MoELayer, submodules=experts)}
