"""The GPUs that the planner knows: datasheet figures, dense peaks, per GPU, in SI units."""

from dataclasses import dataclass

from exprl_megatron.errors import UserError

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One GPU in its usual node. Links are counted in one direction."""

    name: str
    memory_bytes: int
    """What a process can allocate: what torch reports as total memory, less than the label says."""
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

    @property
    def blackwell(self) -> bool:
        """Whether it is of the generation after Hopper."""
        return "mxfp8" in self.fp8_kinds

    def peak(self, fp8: bool) -> tuple[str, float]:
        """The name of the peak that a utilisation refers to, and its FLOP/s."""
        rate = self.fp8_flops if fp8 else self.bf16_flops
        return f"{self.name} dense {'FP8' if fp8 else 'BF16'} {rate / 1e12:.0f} TFLOP/s", rate


_HOPPER = frozenset({"fp8-delayed", "fp8-tensorwise", "fp8-blockwise"})
_BLACKWELL = frozenset({"fp8-delayed", "fp8-tensorwise", "mxfp8"})

GPUS: dict[str, Gpu] = {
    # NVIDIA H100 datasheet, SXM column (its tensor figures are with sparsity: halved here); 132 SMs; NVLink 900 GB/s
    # and ConnectX-7 400 Gb/s per GPU both ways (DGX H100 datasheet); PCIe 5.0 x16 to the host, whose
    # 16 channels of DDR5-4800 serve 8 GPUs (DDR5-5600 in DGX B200).
    "h100": Gpu("H100 SXM", int(79.1 * GIB), 989.4e12, 1978.9e12, 3.35e12, 450e9, 50e9, 64e9, 77e9, 8, 132, _HOPPER),
    # NVIDIA H200 datasheet: H100's cores with 141 GB at 4.8 TB/s.
    "h200": Gpu("H200 SXM", int(139.8 * GIB), 989.4e12, 1978.9e12, 4.8e12, 450e9, 50e9, 64e9, 77e9, 8, 132, _HOPPER),
    # DGX B200 datasheet: 72 PFLOP/s sparse FP8 and 64 TB/s over 8 GPUs; NVLink 1.8 TB/s, 400 Gb/s network; 148 SMs.
    "b200": Gpu("B200", int(178.3 * GIB), 2.25e15, 4.5e15, 8.0e12, 900e9, 50e9, 64e9, 90e9, 8, 148, _BLACKWELL),
    # GB200 NVL72 datasheet: 360 / 720 PFLOP/s sparse BF16 / FP8, 576 TB/s over 72 GPUs in one NVLink domain;
    # NVLink-C2C 900 GB/s both ways between a Grace CPU (LPDDR5X at 512 GB/s) and its two GPUs.
    "gb200": Gpu("GB200", int(184.0 * GIB), 2.5e15, 5.0e15, 8.0e12, 900e9, 50e9, 225e9, 256e9, 72, 148, _BLACKWELL),
}


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`, in any case. Raises UserError for a name that is not known."""
    if name.lower() not in GPUS:
        raise UserError(f"The planner knows no GPU called {name}; use one of {', '.join(GPUS)}.")
    return GPUS[name.lower()]
