"""Seconds of transfers between GPUs: rings over a group of ranks, and the exchange of tokens between experts."""

from exprl_megatron.planning.hardware import Gpu

NVLINK_EFFICIENCY = 0.8
"""What NCCL reaches of NVLink's rate with messages of tens of megabytes (nccl-tests on 8 H100: 360 of 450 GB/s)."""
NIC_EFFICIENCY = 0.9
"""The same of a 400 Gb/s network card (about 45 of 50 GB/s)."""
TP_HIDDEN_SHARE = 0.42
"""Calibrated: the share of a tensor-parallel transfer that overlap saves, less what cutting products up costs."""
MAX_HIDDEN_SHARE = 0.8
"""Largest share of a transfer that disappears behind computation: the first and last pieces have no computation to hide
behind, and transfers take multiprocessors away from it.
"""


def ring_bandwidth(gpu: Gpu, size: int, stride: int) -> float:
    """Return the bytes/s of a ring over `size` ranks that are `stride` apart.

    Within a node NVLink; between nodes each of a node's members brings its own network card.
    """
    if size * stride <= gpu.gpus_per_node:
        return gpu.nvlink_bytes_per_s * NVLINK_EFFICIENCY
    members = max(1, gpu.gpus_per_node // stride)
    return min(gpu.nvlink_bytes_per_s * NVLINK_EFFICIENCY, members * gpu.nic_bytes_per_s * NIC_EFFICIENCY)


def ring_seconds(size_bytes: float, gpu: Gpu, size: int, stride: int) -> float:
    """Return the seconds of one all-gather or reduce-scatter whose whole (gathered) tensor has `size_bytes`."""
    return size_bytes * (size - 1) / size / ring_bandwidth(gpu, size, stride) if size > 1 else 0.0


def exchange_seconds(rows: float, row_bytes: float, chosen: int, gpu: Gpu, size: int, once_per_node: bool) -> float:
    """Return the seconds in which each of `size` ranks sends `rows` rows, `chosen` for each token, evenly to all.

    With `once_per_node` a token crosses to another node once, however many experts it meets there (DeepEP, HybridEP).
    """
    if size == 1:
        return 0.0
    nodes = max(1.0, size / gpu.gpus_per_node)
    outside = 1 - 1 / nodes
    if once_per_node:
        outside = (nodes - 1) * (1 - (1 - 1 / nodes) ** chosen) / chosen
    inside = (size - 1) / size * rows * row_bytes / (gpu.nvlink_bytes_per_s * NVLINK_EFFICIENCY)
    return max(inside, outside * rows * row_bytes / (gpu.nic_bytes_per_s * NIC_EFFICIENCY))


def send_seconds(size_bytes: float, gpu: Gpu, stride: int) -> float:
    """Return the seconds to send `size_bytes` to the rank `stride` further on."""
    if 2 * stride <= gpu.gpus_per_node:
        return size_bytes / (gpu.nvlink_bytes_per_s * NVLINK_EFFICIENCY)
    return size_bytes / (gpu.nic_bytes_per_s * NIC_EFFICIENCY)


def exposed_seconds(transfer: float, beside: float, overlapped: bool, most: float = MAX_HIDDEN_SHARE) -> float:
    """Return the seconds of `transfer` that remain when up to `beside` seconds of computation run at the same time."""
    return transfer - min(most * transfer, beside) if overlapped else transfer
