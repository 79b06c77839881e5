"""Seconds of one GPU's work: matrix products, attention, and passes over memory.

Two kinds of figures: shares of a datasheet peak (`KernelEfficiency`), three of them calibrated (docs/time_model.md),
and counts of bytes.
"""

from dataclasses import dataclass

from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.models.flops import Gemm
from exprl_megatron.planning.hardware import Gpu

TILE = (128, 256)
"""Rows and columns of the output that one multiprocessor holds at a time (CUTLASS's default on Hopper)."""


@dataclass(frozen=True)
class KernelEfficiency:
    """The shares of a datasheet peak that kernels reach."""

    gemm_bf16: float = 0.723
    """Calibrated: long BF16 products on Hopper, of the dense BF16 peak."""
    gemm_fp8: float = 0.674
    """Calibrated: long FP8 products on Hopper, of the dense FP8 peak."""
    traffic: float = 0.80
    """Norms, activations, casts and optimizer, of HBM's bandwidth (what copy kernels reach on H100 is 85 to 90 %)."""
    attention: tuple[float, float] = (0.67, 0.57)
    """Long causal attention on Hopper, forward and backward, of the BF16 peak: FlashAttention-3 measures 614 and 620
    TFLOP/s at 8k and 16k forward (pytorch/benchmark, pull request 2391); backward about 0.85 of it."""
    attention_blackwell: tuple[float, float] = (0.55, 0.47)
    """The same on Blackwell for some milliseconds: exponentials did not grow with products. cuDNN in the
    FlashAttention-4 paper (1,613 TFLOP/s over 1.3, of 2,250); backward in Hopper's proportion."""
    attention_flash2: tuple[float, float] = (0.40, 0.33)
    """The same with FlashAttention-2 on Hopper: 35 % (abstract of the FlashAttention-3 paper, arXiv 2407.08608)."""
    sustained: float = 0.85
    """What power leaves of a Blackwell GPU's short measurements in long runs: after 0.1 s the clock of a B200 falls
    from 1,965 to 1,580 MHz and its FLOP/s by 15 % (flashinfer, pull request 2899). Hopper's share is calibrated."""


EFFICIENCY = KernelEfficiency()
_ATTENTION_HALF = (600.0, 900.0)
"""Length at which attention reaches half of its share, forward and backward (about what those figures fall by)."""
KERNEL_GAP = 4e-6
"""Seconds that one kernel's end and the next one's start cost: drain, launch, ramp."""
_BLOCK_SCALES = 0.95
"""Products with a scale for each block against tensorwise ones (assumed for 128x128 and for MXFP8's 1x32)."""


def gemm_flops_per_s(gpu: Gpu, kind: str) -> float:
    """Return FLOP/s that long products of a precision kind reach in a long run."""
    eight = kind not in ("fp32", "bf16")
    share = EFFICIENCY.gemm_fp8 if eight else EFFICIENCY.gemm_bf16
    if gpu.short_gemm_efficiency is not None:
        share = gpu.short_gemm_efficiency[eight] * EFFICIENCY.sustained
    return gpu.peak(kind)[1] * share * (_BLOCK_SCALES if kind in ("fp8-blockwise", "mxfp8") else 1.0)


def gemm_seconds(gemm: Gemm, gpu: Gpu, kind: str = "bf16", output_bytes: float = 2.0) -> float:
    """Return the seconds of `gemm`: its operations at the reachable rate, half a wave of idle multiprocessors, and the
    write of the output, which the next tile's loads do not hide. Never faster than its operands cross HBM.
    """
    if gemm.flops == 0:
        return 0.0
    tiles = max(gemm.m / TILE[0], 1.0) * max(gemm.n / TILE[1], 1.0)
    compute = gemm.flops / gemm_flops_per_s(gpu, kind) * (1 + gpu.multiprocessors / (2 * tiles))
    write = gemm.m * gemm.n * gemm.copies * output_bytes
    read = (gemm.m + gemm.n) * gemm.k * gemm.copies * {"fp32": 4.0, "bf16": 2.0}.get(kind, 1.0)
    bandwidth = gpu.hbm_bytes_per_s * EFFICIENCY.traffic
    return max(compute + write / bandwidth, (read + write) / bandwidth)


def attention_seconds(
    flops: float, length: float, gpu: Gpu, backward: bool, kind: str = "bf16", generation: int = 3
) -> float:
    """Return the seconds of causal attention's `flops` over sequences of `length` tokens."""
    if gpu.blackwell:
        share = EFFICIENCY.attention_blackwell[backward] * EFFICIENCY.sustained
    else:
        share = (EFFICIENCY.attention if generation >= 3 else EFFICIENCY.attention_flash2)[backward]
    return flops / (gpu.peak(kind)[1] * share * length / (length + _ATTENTION_HALF[backward]))


def hbm_seconds(size: float, gpu: Gpu) -> float:
    """Return the seconds to move `size` bytes through HBM in kernels that do nothing else."""
    return size / (gpu.hbm_bytes_per_s * EFFICIENCY.traffic)


def host_optimizer_seconds(parameters: float, gradient_bytes: float, gpu: Gpu) -> float:
    """Return the seconds to step `parameters` in host memory: gradients down, Adam over fp32 state, BF16 weights up."""
    link = parameters * (gradient_bytes + 2.0) / gpu.host_bytes_per_s
    memory = parameters * (24.0 + gradient_bytes + 2.0) / gpu.host_memory_bytes_per_s
    return (link + memory) / EFFICIENCY.traffic


def cast_bytes(elements: float, precision: PrecisionConfig, both_ways: bool = True) -> float:
    """Return the HBM bytes to quantize `elements` BF16 values: read, write, and the weight gradient's transpose.

    Current scaling reads the values once more to find their largest.
    """
    if not precision.fp8:
        return 0.0
    reads = 4.0 if precision.kind == "fp8-tensorwise" else 2.0
    return elements * (reads + (2.0 if both_ways else 1.0))
