"""Small servers on any device, and how one takes a policy's weights."""

import asyncio
import os
import signal
from itertools import chain
from pathlib import Path
from statistics import mean

import psutil

from exprl_megatron.algorithms.batch import TrainSample
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.policy.policy import Policy
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.server_process import Server
from exprl_megatron.serving.server_spec import ServerSpec
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.disk import DiskTransport
from exprl_megatron.weight_sync.timing import SyncTimes
from exprl_megatron.weight_sync.weight_exporter import WeightExporter
from on_device.compared import Compared, at_most

NEW_TOKENS = 32
FEW_GRAPHS = ("--cuda-graph-max-bs-decode", "8", "--disable-prefill-cuda-graph")
"""A server on a GPU starts without the graphs that large batches and prompts would have."""
FP8 = ("--quantization", "fp8", "--load-format", "flash_rl")
"""Of a server that rounds the weights that it is sent to 8 bits; without flash_rl it would take no new weights."""
CAN_SLEEP = ("--enable-memory-saver",)


def small_server(name: str, model: Path, logs: Path, gpu: int | None, *extra: str) -> ServerSpec:
    """A server of a small model: in bf16 on that GPU, beside others, or where it is None in fp32 on the CPU."""
    if gpu is None:
        return ServerSpec(name, model, ServerConfig(max_total_tokens=4096, extra_args=extra), logs)
    config = ServerConfig(max_total_tokens=16384, mem_fraction_static=0.15, extra_args=(*FEW_GRAPHS, *extra))
    return ServerSpec(name, model, config, logs, dtype="bfloat16", first_gpu=gpu)


def takes_weights(server: Server, policy: Policy, prompts: list[tuple[int, ...]], scratch: Path) -> list[Compared]:
    """A server that holds other weights than `policy`, of the same shape, gets the policy's from disk.

    Its log-probs of what it samples must then be the trainer's, as near as its precision allows.
    """
    bound = 1e-4 if policy.config.precision.kind == "fp32" else 0.1

    def gap(sequences: list[TrainSample], log_probs: list[float]) -> float:
        ours = chain.from_iterable(policy.log_probs(sequences, 1.0))
        return mean(abs(a - b) for a, b in zip(ours, log_probs, strict=True))

    async def run() -> tuple[float, float]:
        async with server.client() as client:
            before = gap(*await _sampled(client, prompts))
            # Through files, as NCCL has no group of two processes on one GPU.
            transport = DiskTransport(
                [client], scratch, Path(policy.config.model), RankCoordinator(240.0), deadline_s=120
            )
            exporter = WeightExporter(
                policy.chunks, policy.architecture, policy.world, 2**20, source_ranks=transport.source_ranks
            )
            await transport.push(exporter, "policy", SyncTimes())
            after = gap(*await _sampled(client, prompts))
            await transport.close()
            return before, after

    before, after = asyncio.run(run())
    what = f"{server.name}: mean |trainer - sampler| log-prob"
    return [
        Compared(f"{what}, other weights", f"{before:.2g}", "more than after the sync", before > after),
        at_most(f"{what}, synced", after, bound),
    ]


def freeze(pid: int) -> list[psutil.Process]:
    """Stop all processes that the supervisor `pid` of a server has started; they keep their sockets."""
    processes = psutil.Process(pid).children(recursive=True)
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    return processes


async def _sampled(client: SGLangClient, prompts: list[tuple[int, ...]]) -> tuple[list[TrainSample], list[float]]:
    """Traces for the prompts, and the sampler's log-probs of all their tokens."""
    asked = [client.generate(p, temperature=1.0, max_new_tokens=NEW_TOKENS, seed=i) for i, p in enumerate(prompts)]
    traces = await asyncio.gather(*asked)
    sequences = [TrainSample(tuple(p), trace.token_ids) for p, trace in zip(prompts, traces, strict=True)]
    return sequences, [value for trace in traces for value in trace.log_probs]
