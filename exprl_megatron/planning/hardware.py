"""The GPUs that the planner knows: datasheet figures, dense peaks, per GPU, in SI units."""

from dataclasses import dataclass, replace

from exprl_megatron.errors import UserError

GIB = 1 << 30
GB = 10**9


@dataclass(frozen=True)
class Gpu:
    """One GPU in its usual node. Links are counted in one direction."""

    name: str
    memory_bytes: int
    """What a process can allocate: what torch reports as total memory, less than the label says."""
    fp32_flops: float
    """FP32 peak without tensor cores, FLOP/s."""
    bf16_flops: float
    """Dense BF16 tensor-core peak, FLOP/s."""
    fp8_flops: float
    """Dense FP8 tensor-core peak, FLOP/s."""
    hbm_bytes_per_s: float
    nvlink_bytes_per_s: float
    nic_bytes_per_s: float
    """Its share of the node's network."""
    host_bytes_per_s: float
    """Its share of the link to host memory."""
    host_memory_bytes_per_s: float
    """Its share of the host memory's own bandwidth."""
    gpus_per_node: int
    """GPUs that reach one another by NVLink."""
    multiprocessors: int
    fp8_kinds: frozenset[str]
    """The precision kinds that its tensor cores run."""
    short_gemm_efficiency: tuple[float, float] | None = None
    """What a product reaches of the BF16 and the FP8 peak for some milliseconds, before power limits the clock.
    None on Hopper, whose sustained shares are calibrated (kernels.py)."""

    @property
    def blackwell(self) -> bool:
        """Whether it is of the generation after Hopper."""
        return "mxfp8" in self.fp8_kinds

    def peak(self, kind: str) -> tuple[str, float]:
        """Return the name of the peak that products of a precision kind refer to, and its FLOP/s."""
        name, rate = {"fp32": ("FP32", self.fp32_flops), "bf16": ("BF16", self.bf16_flops)}.get(
            kind, ("FP8", self.fp8_flops)
        )
        return f"{self.name} dense {name} {rate / 1e12:.0f} TFLOP/s", rate


_HOPPER = frozenset({"fp8-delayed", "fp8-tensorwise", "fp8-blockwise"})
_BLACKWELL = frozenset({"fp8-delayed", "fp8-tensorwise", "mxfp8"})

# NVIDIA H100 datasheet, SXM column (its tensor figures are with sparsity: halved here); 132 SMs; NVLink 900 GB/s and
# ConnectX-7 400 Gb/s per GPU both ways (DGX H100 datasheet); PCIe 5.0 x16 to the host, whose 16 channels of DDR5-4800
# serve 8 GPUs.
_H100 = Gpu(
    name="H100 SXM",
    memory_bytes=int(79.1 * GIB),
    fp32_flops=67e12,
    bf16_flops=989.4e12,
    fp8_flops=1978.9e12,
    hbm_bytes_per_s=3.35e12,
    nvlink_bytes_per_s=450e9,
    nic_bytes_per_s=50e9,
    host_bytes_per_s=64e9,
    host_memory_bytes_per_s=77e9,
    gpus_per_node=8,
    multiprocessors=132,
    fp8_kinds=_HOPPER,
)

GPUS: dict[str, Gpu] = {
    "h100": _H100,
    # NVIDIA H200 datasheet: H100's cores with 141 GB at 4.8 TB/s.
    "h200": replace(_H100, name="H200 SXM", memory_bytes=int(139.8 * GIB), hbm_bytes_per_s=4.8e12),
    # DGX B200 datasheet: 72 PFLOP/s sparse FP8 and 64 TB/s over 8 GPUs; NVLink 1.8 TB/s, 400 Gb/s network, DDR5-5600;
    # 148 SMs. Short products: 1,745 and 3,432.5 TFLOP/s, table of maximum achievable matmul FLOPS, ml-engineering
    # (github.com/stas00/ml-engineering, compute/accelerator).
    "b200": Gpu(
        name="B200",
        memory_bytes=int(178.3 * GIB),
        fp32_flops=75e12,
        bf16_flops=2.25e15,
        fp8_flops=4.5e15,
        hbm_bytes_per_s=8.0e12,
        nvlink_bytes_per_s=900e9,
        nic_bytes_per_s=50e9,
        host_bytes_per_s=64e9,
        host_memory_bytes_per_s=90e9,
        gpus_per_node=8,
        multiprocessors=148,
        fp8_kinds=_BLACKWELL,
        short_gemm_efficiency=(0.776, 0.763),
    ),
    # GB200 NVL72 datasheet: 360 / 720 PFLOP/s sparse BF16 / FP8, 576 TB/s over 72 GPUs in one NVLink domain;
    # NVLink-C2C 900 GB/s both ways between a Grace CPU (LPDDR5X at 512 GB/s) and its two GPUs. Short products: 1,822
    # and 3,615.6 TFLOP/s in the same table.
    "gb200": Gpu(
        name="GB200",
        memory_bytes=int(184.0 * GIB),
        fp32_flops=80e12,
        bf16_flops=2.5e15,
        fp8_flops=5.0e15,
        hbm_bytes_per_s=8.0e12,
        nvlink_bytes_per_s=900e9,
        nic_bytes_per_s=50e9,
        host_bytes_per_s=225e9,
        host_memory_bytes_per_s=256e9,
        gpus_per_node=72,
        multiprocessors=148,
        fp8_kinds=_BLACKWELL,
        short_gemm_efficiency=(0.729, 0.723),
    ),
}


def find_gpu(name: str) -> Gpu:
    """Return the GPU called `name`, in any case.

    Raises:
        UserError: the name is unknown.
    """
    if name.lower() not in GPUS:
        raise UserError(f"The planner knows no GPU called {name}; use one of {', '.join(GPUS)}.")
    return GPUS[name.lower()]
