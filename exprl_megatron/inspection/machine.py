"""This machine's CPU as a device of the planner, with measured rates."""

import time
from collections.abc import Callable
from functools import cache

import psutil

from exprl_megatron.planning.hardware import Gpu
from exprl_megatron.planning.kernels import EFFICIENCY

SIZE = 512
"""Rows, columns and depth of the product that is timed."""
COPIED = 64 * 2**20
"""Bytes of the copy that is timed."""


def measured_cpu(processes: int) -> Gpu:
    """Measure this machine as a planner's device: one of `processes` equal trainer processes with one thread each.

    What is measured is what is reached; the planner takes shares of peaks, so the peaks are set higher by as much.
    """
    flops, copied = _measured_rates()
    peak, bandwidth = flops / EFFICIENCY.gemm_bf16, copied / EFFICIENCY.traffic
    return Gpu(
        name="this CPU",
        memory_bytes=psutil.virtual_memory().total,
        fp32_flops=peak,
        bf16_flops=peak,
        fp8_flops=peak,
        hbm_bytes_per_s=bandwidth,
        nvlink_bytes_per_s=bandwidth,
        nic_bytes_per_s=bandwidth,
        host_bytes_per_s=bandwidth,
        host_memory_bytes_per_s=bandwidth,
        gpus_per_node=processes,
        multiprocessors=0,
        fp8_kinds=frozenset(),
    )


@cache
def _measured_rates() -> tuple[float, float]:
    """Measure FLOP/s of a product and bytes/s of a copy by one thread, once a process: a served page asks at each
    refresh.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        matrix = torch.randn(SIZE, SIZE)
        flops = 2.0 * SIZE**3 / _fastest(lambda: matrix @ matrix)
        values = torch.randn(COPIED // 4)
        target = torch.empty_like(values)
        copied = 2.0 * COPIED / _fastest(lambda: target.copy_(values))
    finally:
        torch.set_num_threads(threads)
    return flops, copied


def _fastest(work: Callable[[], object], for_s: float = 1.0) -> float:
    """Return the seconds of the fastest of many runs: the machine may be busy with other things."""
    until, fastest = time.monotonic() + for_s, float("inf")
    while time.monotonic() < until or fastest == float("inf"):
        started = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - started)
    return fastest
