"""Layers whose norms are behind attention and the MLP, with queries and keys normalized over all heads (Olmo 3).

One description for CUDA and CPU: `post_norm_block` is given the linear layers and the attention of the machine.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.autograd.function import once_differentiable

from exprl_megatron.policy.attention import has_window


@dataclass(frozen=True)
class Modules:
    """The modules of such a layer that differ between CUDA and CPU."""

    column_linear: Any
    row_linear_with_norm: Any
    core_attention: Any
    norm: Any
    activation: Any = None


def post_norm_block(modules: Modules, layers: int) -> TransformerBlockSubmodules:
    """Return `layers` decoder layers, and the final norm (which Megatron builds on the last stage alone)."""
    linear = MLPSubmodules(modules.column_linear, modules.row_linear_with_norm, activation_func=modules.activation)
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=WholeWidthAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=modules.column_linear,
                    core_attention=modules.core_attention,
                    linear_proj=modules.row_linear_with_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=partial(MLP.as_mlp_submodule, submodules=linear),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=modules.norm)


class PostNorm(torch.nn.Module):
    """Mixed into a row-parallel linear layer: a norm of its output, after the sum over ranks."""

    norm: Any

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_layernorm = self.norm(config=config, hidden_size=output_size, eps=config.layernorm_epsilon)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden: [sequence, batch, input_size]; returns (normalized output, None) as the linear layer does."""
        output, bias = super().forward(hidden)
        return self.post_layernorm(output), bias


class ScaledWhereStretched(torch.nn.Module):
    """Mixed into core attention: YaRN's factor is in the softmax of layers with stretched positions alone."""

    def __init__(self, config: TransformerConfig, layer_number: int, *args, softmax_scale: float | None = None, **kw):
        scale = None if has_window(config, layer_number) else softmax_scale
        super().__init__(config, layer_number, *args, softmax_scale=scale, **kw)


class WholeWidthAttention(SelfAttention):
    """Self-attention with norms over all heads' queries, and keys, and a rotary table of its own kind of layer.

    Megatron hands every layer one table: here that of full attention and that of windows, as `two_tables` joins them.
    Megatron's own norms of queries and keys are not asked for: they are per head, and it sums their gradients over
    tensor-parallel ranks (finalize_model_grads.py), each of which has other weights here.
    """

    def __init__(self, config: TransformerConfig, submodules: SelfAttentionSubmodules, layer_number: int, **kwargs):
        super().__init__(config, submodules, layer_number, **kwargs)
        self.table = int(has_window(config, layer_number))
        heads, groups = self.num_attention_heads_per_partition, self.num_query_groups_per_partition
        self.q_norm = WholeWidthNorm(config, heads, self.pg_collection)
        self.k_norm = WholeWidthNorm(config, groups, self.pg_collection)

    def forward(self, *args, rotary_pos_emb: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute what Megatron's forward does; rotary_pos_emb: [sequence, 1, 1, both tables]."""
        own = one_table(rotary_pos_emb, self.table, self.config.kv_channels // 2)
        return super().forward(*args, rotary_pos_emb=own, **kwargs)

    def get_query_key_value_tensors(self, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return [sequence, batch, heads or groups of this rank, head_dim], queries and keys normalized."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        weights = self.q_norm(), self.k_norm()
        return (*whole_width_norms((query, key), weights, self.q_norm.eps, self.q_norm.group), value)


def two_tables(full: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Return the frequencies of both kinds of layers, [pairs] each, as the [2 x pairs] of Megatron's table."""
    return torch.cat((full, window))


def one_table(both: torch.Tensor, number: int, pairs: int) -> torch.Tensor:
    """Return the part of the table `both`, [..., k x 2 x pairs], that comes of the first or second frequencies.

    Megatron repeats what it makes of the frequencies (k is 2), a RotationTable has k = 4 functions of it.
    """
    return both.unflatten(-1, (-1, 2, pairs))[..., number, :].flatten(-2)


class WholeWidthNorm(torch.nn.Module):
    """The weight of a root-mean-square norm over all heads, of which tensor-parallel ranks have some each."""

    def __init__(self, config: TransformerConfig, heads: int, groups: ProcessGroupCollection):
        super().__init__()
        self.group, self.eps = groups.tp, config.layernorm_epsilon
        self.shape = (heads, config.kv_channels)
        self.weight = torch.nn.Parameter(torch.ones(heads * config.kv_channels, dtype=config.params_dtype))
        # Each rank has other weights: their gradients are this rank's own, and all of them are in the gradient's norm.
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self) -> torch.Tensor:
        """Return [heads of this rank, head_dim]; by a call, as Megatron waits for a gathered weight in its module's
        hooks.
        """
        return self.weight.view(self.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Return the weight, cut along its only dimension."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )


def whole_width_norms(
    states: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], eps: float, group
) -> tuple[torch.Tensor, ...]:
    """Return each of `states`, [..., heads of this rank, head_dim], normalized over the heads of all ranks of `group`.

    weights: [heads of this rank, head_dim] of each. One collective for all of them, and one for their gradients.
    """
    return _WholeWidthNorms.apply(eps, group, *states, *weights)


class _WholeWidthNorms(torch.autograd.Function):
    """y = w x r, r = 1 / sqrt(mean x^2 + eps), in fp32; the gradient of x is r (g w - x r^2 mean(g w x))."""

    @staticmethod
    def forward(ctx, eps: float, group, *states_and_weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = len(states_and_weights) // 2
        states, weights = states_and_weights[:count], states_and_weights[count:]
        exact = [each.float() for each in states]
        means = _means_over_ranks((each.square() for each in exact), group)
        inverses = [(mean + eps).rsqrt() for mean in means]
        ctx.save_for_backward(*states, *weights, *inverses)
        ctx.group = group
        parts = zip(states, exact, inverses, weights, strict=True)
        return tuple((x * inverse * weight).to(each.dtype) for each, x, inverse, weight in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: torch.Tensor):
        saved, count = ctx.saved_tensors, len(grads)
        states, weights, inverses = saved[:count], saved[count : 2 * count], saved[2 * count :]
        normed = [each.float() * inverse for each, inverse in zip(states, inverses, strict=True)]
        exact = [grad.float() for grad in grads]
        of_weights = [
            (grad * norm).flatten(0, -3).sum(0).to(weight.dtype)
            for grad, norm, weight in zip(exact, normed, weights, strict=True)
        ]
        exact = [grad * weight for grad, weight in zip(exact, weights, strict=True)]
        means = _means_over_ranks((grad * norm for grad, norm in zip(exact, normed, strict=True)), ctx.group)
        of_states = [
            (inverse * (grad - norm * mean)).to(each.dtype)
            for each, inverse, grad, norm, mean in zip(states, inverses, exact, normed, means, strict=True)
        ]
        return None, None, *of_states, *of_weights


def _means_over_ranks(values: Iterable[torch.Tensor], group) -> list[torch.Tensor]:
    """Reduce [..., heads of this rank, head_dim] each to [..., 1, 1] each: the means over all ranks' heads."""
    sums, sizes = [], []
    for each in values:
        sums.append(each.sum((-2, -1), keepdim=True))
        sizes.append(each.shape[-2] * each.shape[-1] * group.size())
    totals = torch.stack(sums)
    if group.size() > 1:
        torch.distributed.all_reduce(totals, group=group)
    return [total / size for total, size in zip(totals, sizes, strict=True)]
