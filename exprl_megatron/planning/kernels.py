"""How long one GPU computes: matrix products, attention, and passes over memory.

Two kinds of figures: `Shares` of a datasheet peak, three of them calibrated (docs/time_model.md), and counts of bytes.
"""

from dataclasses import dataclass

from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.planning.flops import Gemm
from exprl_megatron.planning.hardware import Gpu

TILE = (128, 256)
"""Rows and columns of the output that one multiprocessor holds at a time (CUTLASS's default on Hopper)."""


@dataclass(frozen=True)
class Shares:
    """What kernels reach of a peak."""

    gemm_bf16: float = 0.75
    """Calibrated: long BF16 products, of the dense BF16 peak."""
    gemm_fp8: float = 0.65
    """Calibrated: long FP8 products, of the dense FP8 peak."""
    traffic: float = 0.75
    """Calibrated: norms, activations, casts and optimizer, of HBM's bandwidth."""
    attention_forward: float = 0.67
    """Long causal attention with head size 128, of the BF16 peak (FlashAttention-3, figure 5)."""
    attention_backward: float = 0.57


SHARES = Shares()
_ATTENTION_HALF = {"forward": 600.0, "backward": 900.0}
"""Length at which attention reaches half of its share (read off the same figure)."""
_BLOCKWISE = 0.95
"""Products with 128x128 scales against tensorwise ones: partial sums are scaled outside the tensor core."""


def gemm_seconds(gemm: Gemm, gpu: Gpu, fp8: bool = False, output_bytes: float = 2.0, kind: str = "bf16") -> float:
    """Seconds of `gemm`: its operations at the reachable rate, half a wave of idle multiprocessors, and the write
    of the output, which the next tile's loads do not hide. Never faster than its operands cross HBM.
    """
    if gemm.flops == 0:
        return 0.0
    share = SHARES.gemm_fp8 if fp8 else SHARES.gemm_bf16
    if kind == "fp8-blockwise" and fp8:
        share *= _BLOCKWISE
    tiles = max(gemm.m / TILE[0], 1.0) * max(gemm.n / TILE[1], 1.0) * gemm.copies
    compute = gemm.flops / (gpu.peak(fp8)[1] * share) * (1 + gpu.multiprocessors / (2 * tiles))
    write = gemm.m * gemm.n * gemm.copies * output_bytes
    read = (gemm.m + gemm.n) * gemm.k * gemm.copies * (1.0 if fp8 else 2.0)
    bandwidth = gpu.hbm_bytes_per_s * SHARES.traffic
    return max(compute + write / bandwidth, (read + write) / bandwidth)


def attention_seconds(flops: float, length: float, gpu: Gpu, backward: bool, fp8: bool = False) -> float:
    """Seconds of causal attention's `flops` over sequences of `length` tokens."""
    way = "backward" if backward else "forward"
    share = SHARES.attention_backward if backward else SHARES.attention_forward
    return flops / (gpu.peak(fp8)[1] * share * length / (length + _ATTENTION_HALF[way]))


def traffic_seconds(size: float, gpu: Gpu) -> float:
    """Seconds to move `size` bytes through HBM in kernels that do nothing else."""
    return size / (gpu.hbm_bytes_per_s * SHARES.traffic)


def cast_bytes(elements: float, precision: PrecisionConfig, both_ways: bool = True) -> float:
    """HBM bytes to quantise `elements` BF16 values: read, write, and the transpose that the weight gradient needs.

    Current scaling reads the values once more to find their largest.
    """
    if not precision.fp8:
        return 0.0
    reads = 4.0 if precision.kind == "fp8-tensorwise" else 2.0
    return elements * (reads + (2.0 if both_ways else 1.0))
