"""Seconds in which servers read prompts and write answers: a roofline of prefill and decode."""

from dataclasses import dataclass
from functools import cached_property
from math import exp, log

from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.flops import linear_flops, linear_parameters, model_flops
from exprl_megatron.planning.hardware import Gpu
from exprl_megatron.planning.kernels import EFFICIENCY, KERNEL_GAP, gemm_flops_per_s
from exprl_megatron.planning.links import NIC_EFFICIENCY, NVLINK_EFFICIENCY

ITERATION_S = 0.006
"""Calibrated (docs/time_model.md): scheduling, sampling and returning tokens, for each decode iteration."""
_KERNELS = 12
_HOP_S = (8e-6, 60e-6)
"""Latency of one all-reduce of a decode iteration: one-shot kernels inside a node, NCCL between nodes."""
_SLICES = 64


@dataclass(frozen=True)
class ServerHardware:
    """A number of equal servers of one model."""

    count: int
    tp: int
    """GPUs of each."""
    gpu: Gpu
    weight_bytes: float = 2.0
    """Bytes of a weight as served; 1 for FP8."""
    kv_bytes: float = 2.0
    """Bytes of a cached value."""
    memory_share: float = 0.8
    """Of a GPU's memory, for weights and KV cache."""

    @property
    def kind(self) -> str:
        """The precision kind in which the server multiplies."""
        return "fp8-tensorwise" if self.weight_bytes < 2 else "bf16"


@dataclass(frozen=True)
class LengthDistribution:
    """Lengths of answers: the maximum-entropy distribution with this mean and bound (a truncated exponential)."""

    mean: float
    bound: float

    @cached_property
    def rate(self) -> float:
        """Decay of the density, per token; negative where the mean is above half of the bound.

        Raises: UserError where the mean is not between 0 and the bound.
        """
        if not 0 < self.mean < self.bound:
            raise UserError(f"The mean length {self.mean:g} is not between 0 and the bound {self.bound:g}; change one.")
        low, high = -60.0 / self.bound, 60.0 / self.bound + 1 / self.mean
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if self._mean_at(middle) > self.mean else (low, middle)
        return (low + high) / 2

    def share_longer(self, length: float) -> float:
        """Return the share of answers longer than `length`."""
        if length >= self.bound:
            return 0.0
        rate = self.rate
        if abs(rate * self.bound) < 1e-6:
            return 1 - length / self.bound
        return (exp(-rate * length) - exp(-rate * self.bound)) / (1 - exp(-rate * self.bound))

    def expected_longest(self, count: float) -> float:
        """Return the length that the longest of `count` answers reaches: the one that 1 in `count` exceeds."""
        rate, share = self.rate, 1 / max(count, 1.0 + 1e-9)
        if abs(rate * self.bound) < 1e-6:
            return self.bound * (1 - share)
        tail = exp(-rate * self.bound)
        return -log(tail + share * (1 - tail)) / rate

    def _mean_at(self, rate: float) -> float:
        scaled = rate * self.bound
        if abs(scaled) < 1e-6:
            return self.bound / 2
        return 1 / rate - self.bound * exp(-scaled) / (1 - exp(-scaled))


@dataclass(frozen=True)
class ServingTime:
    """Seconds of the slowest server; servers share requests evenly."""

    prefill_s: float
    decode_s: float
    iterations: float
    concurrent: float
    """Requests that one server holds at a time."""
    requests: float
    """Requests of one server in all."""

    @property
    def total_s(self) -> float:
        """Seconds of both together."""
        return self.prefill_s + self.decode_s


def serving_time(
    architecture: Architecture,
    servers: ServerHardware,
    *,
    requests: int,
    prompt_tokens: float,
    read_tokens: float,
    answers: LengthDistribution,
) -> ServingTime:
    """Return the seconds to answer `requests` prompts of `prompt_tokens`; `read_tokens` of all their tokens must be
    read, the rest is cached.

    Raises:
        UserError: the weights do not leave room for one request.
    """
    each = requests / servers.count
    longest = answers.expected_longest(requests)
    fullest = max(
        answers.share_longer(length) * (prompt_tokens + length)
        for length in (longest * piece / _SLICES for piece in range(_SLICES))
    )
    state = state_bytes(architecture) / cache_bytes(architecture, servers)
    concurrent = min(each, _kv_cache_tokens(architecture, servers) / (fullest + state))
    if concurrent < 1 <= each:
        raise UserError(
            f"{servers.tp} {servers.gpu.name} hold the weights but not one request of {prompt_tokens:.0f} tokens; "
            f"use a larger tp for the servers."
        )
    decode, iterations = 0.0, 0.0
    waves = each / concurrent
    for piece in range(_SLICES):
        length = (piece + 0.5) * longest / _SLICES
        batch = concurrent * answers.share_longer(length)
        seconds = longest / _SLICES * iteration_seconds(architecture, servers, max(batch, 1.0), prompt_tokens + length)
        # Later waves fill the places that answers leave: they cost what full batches of this length cost.
        decode += seconds * (1 + (waves - 1) * answers.share_longer(length))
        iterations += longest / _SLICES * (1 + (waves - 1) * answers.share_longer(length))
    prefill = prefill_seconds(architecture, servers, read_tokens / servers.count, prompt_tokens)
    return ServingTime(prefill, decode, iterations, concurrent, each)


def prefill_seconds(architecture: Architecture, servers: ServerHardware, tokens: float, length: float) -> float:
    """Return the seconds in which one server reads `tokens` tokens of prompts `length` long."""
    flops = tokens * model_flops(architecture, length, training=False)
    return flops / (servers.tp * gemm_flops_per_s(servers.gpu, servers.kind))


def iteration_seconds(architecture: Architecture, servers: ServerHardware, batch: float, context: float) -> float:
    """Return the seconds in which one server adds a token to each of `batch` answers that have `context` tokens."""
    gpu, layers = servers.gpu, architecture.layers
    bandwidth = gpu.hbm_bytes_per_s * EFFICIENCY.traffic * servers.tp
    dense, experts = linear_parameters(architecture)
    if architecture.experts:
        experts *= 1 - (1 - architecture.experts.top_k / architecture.experts.count) ** batch
    weights = (dense + experts) * servers.weight_bytes + architecture.vocabulary * architecture.hidden * 2.0
    compute = batch * linear_flops(architecture) / (servers.tp * gemm_flops_per_s(gpu, servers.kind))
    # A state is read and written.
    each = _tokens_read(architecture, context) * cache_bytes(architecture, servers) + 2 * state_bytes(architecture)
    cache = batch * each
    fixed = ITERATION_S + layers * _KERNELS * KERNEL_GAP
    return max(weights / bandwidth, compute) + cache / bandwidth + fixed + _all_reduces(architecture, servers, batch)


def _tokens_read(architecture: Architecture, context: float) -> float:
    """Return the cached tokens that a new one's attention reads in the mean layer; servers keep those outside of
    windows too.
    """
    kinds = architecture.kinds().items()
    return sum(count * min(context, kind.window or context) for kind, count in kinds) / architecture.layers


def cache_bytes(architecture: Architecture, servers: ServerHardware) -> float:
    """Return the bytes of KV cache of one token."""
    return 2 * architecture.attention_layers * architecture.kv_groups * architecture.head_dim * servers.kv_bytes


def state_bytes(architecture: Architecture) -> int:
    """Return the bytes of one request that do not grow with it: the states of its gated delta nets."""
    net = architecture.delta_net
    return (architecture.layers - architecture.attention_layers) * net.state_bytes if net is not None else 0


def _all_reduces(architecture: Architecture, servers: ServerHardware, batch: float) -> float:
    if servers.tp == 1:
        return 0.0
    outside = servers.tp > servers.gpu.gpus_per_node
    rate = (
        servers.gpu.nic_bytes_per_s * NIC_EFFICIENCY if outside else servers.gpu.nvlink_bytes_per_s * NVLINK_EFFICIENCY
    )
    size = batch * architecture.hidden * 2.0 * 2 * (servers.tp - 1) / servers.tp
    return 2 * architecture.layers * (_HOP_S[outside] + size / rate)


def _kv_cache_tokens(architecture: Architecture, servers: ServerHardware) -> float:
    """Return the tokens that one server's KV cache holds."""
    dense, experts = linear_parameters(architecture)
    weights = (dense + experts) * servers.weight_bytes
    weights += 2 * architecture.vocabulary * architecture.hidden * 2.0
    free = servers.tp * servers.gpu.memory_bytes * servers.memory_share - weights
    if free <= 0:
        raise UserError(
            f"{weights / 1e9:.0f} GB of weights do not fit into {servers.tp} {servers.gpu.name} at "
            f"{servers.memory_share:.0%} of their memory; use a larger tp for the servers."
        )
    return free / (cache_bytes(architecture, servers))
