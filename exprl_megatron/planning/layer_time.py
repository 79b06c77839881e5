"""Seconds of one layer of one micro-batch on one rank, forward and backward, by cause."""

from dataclasses import dataclass, fields
from typing import Literal

from exprl_megatron.config.policy import Layout
from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.flops import attention_flops, attention_gemms, mlp_gemms, router_gemm
from exprl_megatron.planning.hardware import Gpu
from exprl_megatron.planning.kernels import KERNEL_GAP, attention_seconds, cast_bytes, gemm_seconds, hbm_seconds
from exprl_megatron.planning.links import TP_HIDDEN_SHARE, exchange_seconds, exposed_seconds, ring_seconds
from exprl_megatron.planning.trainer_features import TrainerFeatures


@dataclass(frozen=True)
class RankWorkload:
    """Everything that decides how long one rank works on one layer."""

    architecture: Architecture
    """Of a model whose layers are all like this one."""
    layout: Layout
    precision: PrecisionConfig
    sequence_length: float
    tokens: float
    """Of one micro-batch on this rank: already divided by cp, not by tp."""
    gpu: Gpu
    features: TrainerFeatures

    @property
    def kind(self) -> Literal["fp32", "bf16"]:
        """The format outside FP8 products."""
        return "fp32" if self.precision.kind == "fp32" else "bf16"

    @property
    def width(self) -> float:
        """Bytes of an activation."""
        return 4.0 if self.kind == "fp32" else 2.0

    @property
    def rows(self) -> float:
        """Rows that pass this rank's MLP: tokens, or with experts the copies of tokens that it receives."""
        if self.architecture.experts is None:
            return self.tokens
        return self.tokens / self.layout.tp * self.architecture.experts.top_k * self.layout.etp

    @property
    def sharded_tokens(self) -> float:
        """Tokens in the parts between the tensor-parallel blocks."""
        return self.tokens / (self.layout.tp if self.layout.sequence_parallel else 1)


@dataclass(frozen=True)
class LayerTime:
    """Seconds by cause."""

    gemm: float
    attention: float
    memory: float
    tp: float
    cp: float
    ep: float

    @property
    def total(self) -> float:
        """The sum of all parts, in seconds."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: "LayerTime") -> "LayerTime":
        return LayerTime(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, count: float) -> "LayerTime":
        return LayerTime(*(getattr(self, f.name) * count for f in fields(self)))


NO_TIME = LayerTime(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def forward_layer(rank: RankWorkload) -> LayerTime:
    """Return the seconds of a layer's forward pass."""
    gemm = sum(_product(rank, g) for g in _gemms(rank)) + _router(rank, 1)
    attention = _attention(rank, backward=False)
    memory = hbm_seconds(_forward_bytes(rank), rank.gpu) + _kernels(rank, backward=False) * KERNEL_GAP
    return LayerTime(
        gemm=gemm,
        attention=attention,
        memory=memory,
        tp=_tensor_parallel(rank, gathers=4 if _gathers_mlp(rank) else 2, compute_s=gemm),
        cp=_context_parallel(rank, attention, times=1),
        ep=_expert_parallel(rank, gemm + attention),
    )


def backward_layer(rank: RankWorkload) -> LayerTime:
    """Return the seconds of a layer's backward pass: gradients of inputs and, unless frozen, of weights."""
    gemm = sum(_product(rank, g.input_gradient()) for g in _gemms(rank)) + _router(rank, 2)
    if not rank.features.lora:
        gemm += sum(_product(rank, g.weight_gradient(), 2 * rank.features.gradient_bytes) for g in _gemms(rank))
    attention = _attention(rank, backward=True)
    gathers = 6 if rank.layout.sequence_parallel and not rank.features.lora else 4
    return LayerTime(
        gemm=gemm,
        attention=attention,
        memory=hbm_seconds(_backward_bytes(rank), rank.gpu) + _kernels(rank, backward=True) * KERNEL_GAP,
        tp=_tensor_parallel(rank, gathers if _gathers_mlp(rank) else gathers // 2, compute_s=gemm),
        cp=_context_parallel(rank, attention, times=2),
        ep=_expert_parallel(rank, gemm + attention),
    )


def _gathers_mlp(rank: RankWorkload) -> bool:
    """Return whether an MLP that all tokens pass is divided by tensor parallelism."""
    return rank.architecture.experts is None or rank.architecture.experts.shared_ffn > 0


def _gemms(rank: RankWorkload):
    layout = rank.layout
    return (
        *attention_gemms(rank.architecture, rank.tokens, layout.tp),
        *mlp_gemms(rank.architecture, rank.tokens, layout.tp, layout.ep, layout.etp),
    )


def _product(rank: RankWorkload, gemm, output_bytes: float = 2.0) -> float:
    return gemm_seconds(gemm, rank.gpu, rank.precision.kind, output_bytes)


def _router(rank: RankWorkload, times: int) -> float:
    return times * gemm_seconds(router_gemm(rank.architecture, rank.tokens, rank.layout.tp), rank.gpu, rank.kind)


def _attention(rank: RankWorkload, backward: bool) -> float:
    """Return the seconds of causal attention, in pieces under cp; five products backward, two forward."""
    flops = attention_flops(rank.architecture, rank.sequence_length) * rank.tokens / rank.layout.tp
    return attention_seconds(
        flops * (2.5 if backward else 1),
        rank.sequence_length / rank.layout.cp,
        rank.gpu,
        backward,
        rank.precision.kind if rank.precision.fp8_attention else rank.kind,
        rank.features.flash_attention,
    )


def _forward_bytes(rank: RankWorkload) -> float:
    """Return the HBM bytes outside the products: two norms and residual additions, rotation, activation, casts,
    permutation.
    """
    architecture, layout = rank.architecture, rank.layout
    heads = _projected(architecture) / layout.tp
    between = 10 * rank.sharded_tokens * architecture.hidden
    inside = rank.tokens * 2 * heads + 3 * _activated(rank)
    casts = cast_bytes(
        rank.tokens * (architecture.hidden + architecture.heads * architecture.head_dim / layout.tp)
        + rank.rows * architecture.hidden
        + _activated(rank),
        rank.precision,
    )
    return rank.width * (between + inside + _permuted(rank)) + casts


def _backward_bytes(rank: RankWorkload) -> float:
    """Return the bytes of the backward pass: gradients of norms, residual sums, rotation, activation; their casts."""
    architecture, layout = rank.architecture, rank.layout
    heads = _projected(architecture) / layout.tp
    between = 12 * rank.sharded_tokens * architecture.hidden
    inside = rank.tokens * 2 * heads + 5 * _activated(rank)
    casts = cast_bytes(
        rank.tokens * (heads + architecture.hidden) + rank.rows * architecture.hidden + 2 * _activated(rank),
        rank.precision,
    )
    return rank.width * (between + inside + _permuted(rank)) + casts


def _projected(architecture: Architecture) -> float:
    """Return the numbers for each token that the input projection gives."""
    return attention_gemms(architecture, 1, 1)[0].n


def _kernels(rank: RankWorkload, backward: bool) -> float:
    """Return the number of kernels: norms, rotation, sums, products, attention, activation; casts; each expert."""
    casts = {"fp8-delayed": 1, "fp8-tensorwise": 3, "fp8-blockwise": 1, "mxfp8": 2}.get(rank.precision.kind, 0)
    count = (24 if backward else 12) + 4 * casts
    if rank.architecture.experts is None:
        return count
    experts = rank.architecture.experts
    local = experts.count / rank.layout.ep + (experts.shared_ffn > 0)
    return count + 20 + local * ((4 if backward else 2) + 2 * casts)


def _permuted(rank: RankWorkload) -> float:
    """Return the elements that move when tokens are copied to their experts' order and back: seven passes over the
    copies.
    """
    return 7.0 * rank.rows * rank.architecture.hidden if rank.architecture.experts else 0.0


def _activated(rank: RankWorkload) -> float:
    """Return the numbers that the activation functions of a layer give."""
    experts, layout = rank.architecture.experts, rank.layout
    if experts is None:
        return rank.rows * rank.architecture.ffn / layout.tp
    return rank.rows * experts.ffn / layout.etp + rank.tokens * experts.shared_ffn / layout.tp


def _tensor_parallel(rank: RankWorkload, gathers: int, compute_s: float) -> float:
    """Return the seconds of `gathers` all-gathers or reduce-scatters of the layer's activations (an all-reduce
    is two of them).
    """
    size = rank.tokens * rank.architecture.hidden * rank.width
    transfer = gathers * ring_seconds(size, rank.gpu, rank.layout.tp, 1)
    return exposed_seconds(transfer, compute_s, rank.features.tp_overlap, TP_HIDDEN_SHARE)


def _context_parallel(rank: RankWorkload, attention: float, times: int) -> float:
    """Return the seconds in which keys and values pass round the ring during attention; their gradients do so
    backward.
    """
    architecture, layout = rank.architecture, rank.layout
    kept = rank.tokens * 2 * architecture.kv_groups * architecture.head_dim / layout.tp * rank.width
    transfer = times * ring_seconds(kept * layout.cp, rank.gpu, layout.cp, layout.tp)
    return exposed_seconds(transfer, attention, True)


def _expert_parallel(rank: RankWorkload, compute_s: float) -> float:
    """Return the seconds in which tokens are sent to their experts and back."""
    architecture, layout = rank.architecture, rank.layout
    if architecture.experts is None or layout.ep * layout.etp == 1:
        return 0.0
    copies = rank.tokens / layout.tp * architecture.experts.top_k
    row = architecture.hidden * rank.width
    across = 2 * exchange_seconds(
        copies, row, architecture.experts.top_k, rank.gpu, layout.ep * layout.etp, rank.features.once_per_node
    )
    within = 2 * ring_seconds(copies * layout.etp * row, rank.gpu, layout.etp, 1)
    return exposed_seconds(across, compute_s, rank.features.ep_overlap) + within
