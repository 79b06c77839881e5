"""Real SGLang servers on CUDA devices: weights into one that multiplies in FP8 and one on another device, and sleep."""

import asyncio
import time
from itertools import chain
from statistics import mean

import pytest
import torch
from learning import MINIATURE, batches, learn, policy_of

from exprl_megatron.accelerator import gpu_count, uses_cuda
from exprl_megatron.config.policy import Layout
from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.policy.batch import Sequence
from exprl_megatron.resharding.broadcast import BroadcastTransport
from exprl_megatron.resharding.control import Control
from exprl_megatron.resharding.direct import DirectTransport
from exprl_megatron.resharding.disk import DiskTransport
from exprl_megatron.resharding.gather import gather_buckets
from exprl_megatron.resharding.outgoing import Outgoing
from exprl_megatron.resharding.timing import SyncTimes
from exprl_megatron.serving.checksums import checksums
from exprl_megatron.serving.launch import ServerSpec, start_servers

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
MODEL = MINIATURE / "policy"
SMALL = ("--mem-fraction-static", "0.2")
NEW_TOKENS = 32


def started(tmp_path, *extra_args: str):
    """A running bf16 server of the miniature."""
    if not uses_cuda():
        pytest.skip("needs a CUDA device and the GPU environment")
    config = ServerConfig(extra_args=(*SMALL, *extra_args))
    return start_servers([ServerSpec("policy-0", MODEL, config, tmp_path / "logs", dtype="bfloat16")])[0]


async def sampled(client, prompts) -> tuple[list[Sequence], list[float]]:
    """Traces for the prompts, and the sampler's log-probs of all their tokens."""
    asked = [client.generate(p, temperature=1.0, max_new_tokens=NEW_TOKENS, seed=i) for i, p in enumerate(prompts)]
    traces = await asyncio.gather(*asked)
    sequences = [Sequence(tuple(p), trace.token_ids) for p, trace in zip(prompts, traces, strict=True)]
    return sequences, [value for trace in traces for value in trace.log_probs]


def test_an_fp8_server_takes_the_policys_bf16_weights(tmp_path, table):
    from exprl_megatron.policy.world import enter_world, leave_world

    prompts = [sequence.prompt_ids for sequence in batches(1)[0]]
    # With flash_rl the server rounds what it is sent; else it would take no new weights.
    with started(tmp_path, "--quantization", "fp8", "--load-format", "flash_rl") as server:
        enter_world(Layout())
        try:
            precision = PrecisionConfig(kind="bf16")
            policy = policy_of(precision)
            learn(precision, 20, policy)

            def gap(sequences, log_probs) -> float:
                ours = chain.from_iterable(policy.log_probs(sequences, 1.0))
                return mean(abs(a - b) for a, b in zip(ours, log_probs, strict=True))

            async def run() -> tuple[float, float]:
                async with server.client() as client:
                    before = gap(*await sampled(client, prompts))
                    # On one device: NCCL has no group of two processes on the same GPU.
                    transport = DiskTransport([client], tmp_path / "sync", MODEL, Control(240.0), deadline_s=120)
                    outgoing = Outgoing(
                        policy.chunks, policy.architecture, policy.world, 2**20, fillers=transport.fillers
                    )
                    await transport.push(outgoing, "v1", SyncTimes())
                    after = gap(*await sampled(client, prompts))
                    await transport.close()
                    return before, after

            before, after = asyncio.run(run())
        finally:
            leave_world()
    table("FP8 server: mean |trainer - sampler| log-prob, old weights", f"{before:.4f}", "more than after the sync")
    table("FP8 server: mean |trainer - sampler| log-prob, synced", f"{after:.4f}", "at most 0.1")
    assert after < before and after <= 0.1


@pytest.mark.parametrize("kind", [BroadcastTransport, DirectTransport])
def test_weights_reach_a_server_on_another_device(tmp_path, table, kind):
    from exprl_megatron.policy.world import enter_world, leave_world

    if gpu_count() < 2:
        pytest.skip("needs two CUDA devices")
    config = ServerConfig(extra_args=SMALL)
    spec = ServerSpec("policy-0", MODEL, config, tmp_path / "logs", dtype="bfloat16", first_gpu=1)
    with start_servers([spec])[0] as server:
        enter_world(Layout())
        try:
            policy = policy_of(PrecisionConfig(kind="bf16"))

            async def bring(transport, client, version: str) -> float:
                for parameter in policy.chunks[0].parameters():
                    parameter.data.neg_()
                outgoing = Outgoing(policy.chunks, policy.architecture, policy.world, 2**20, fillers=transport.fillers)
                started = time.monotonic()
                await transport.push(outgoing, version, SyncTimes())
                return time.monotonic() - started

            async def run():
                async with server.client() as client:
                    transport = kind([client], 1, policy.world, Control(240.0), deadline_s=120)
                    # The first opens the group.
                    seconds = [await bring(transport, client, f"v{number}") for number in range(3)]
                    held = await client.checksums()
                    await transport.close()
                    return min(seconds), held

            seconds, held = asyncio.run(run())
            buckets = gather_buckets(policy.chunks, policy.architecture, policy.world, 2**30)
            named = [pair for bucket in buckets for pair in bucket]
            expected = checksums(named, tied=policy.architecture.tied, server="cuda" if uses_cuda() else "cpu")
        finally:
            leave_world()
    table(f"{kind.__name__}: checksums agree", held == (expected,), True)
    table(f"{kind.__name__}: seconds to bring the miniature", f"{seconds:.3f}", "no bound")
    assert held == (expected,)


def test_a_server_sleeps_and_wakes(tmp_path, table):
    prompt = batches(1)[0][0].prompt_ids
    with started(tmp_path, "--enable-memory-saver") as server:

        async def run():
            async with server.client() as client:
                before = await client.generate(prompt, temperature=0.0, max_new_tokens=NEW_TOKENS, seed=0)
                awake = torch.cuda.mem_get_info()[0]
                await client.sleep()
                asleep = torch.cuda.mem_get_info()[0]
                await client.wake()
                await client.update_from_disk(MODEL, "again")
                after = await client.generate(prompt, temperature=0.0, max_new_tokens=NEW_TOKENS, seed=0)
                return before, after, (asleep - awake) / 2**30

        before, after, freed = asyncio.run(run())
    table("sleep: memory that a server gives up", f"{freed:.1f} GiB", "more than 1 GiB")
    table("wake: greedy tokens as before", before.token_ids == after.token_ids, True)
    assert freed > 1
    assert before.token_ids == after.token_ids
