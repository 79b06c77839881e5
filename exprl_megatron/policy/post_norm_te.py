"""Transformer Engine's part of layers with norms behind attention and MLP; can be imported where it is alone."""

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TENorm,
    TERowParallelLinear,
)

from exprl_megatron.policy.post_norm import Modules, PostNorm, ScaledWhereStretched


class TERowLinearWithNorm(PostNorm, TERowParallelLinear):
    """The linear layer, then the norm of its output."""

    norm = TENorm


class TEScaledAttention(ScaledWhereStretched, TEDotProductAttention):
    """Attention that takes its window from Megatron's config, and its softmax's factor by its kind of layer."""


MODULES = Modules(TEColumnParallelLinear, TERowLinearWithNorm, TEScaledAttention, TENorm)
