"""Real SGLang servers on CUDA devices: FP8, sleep, and weights over NCCL from one device to another."""

import asyncio

import pytest
import torch
from on_device.compared import at_least, equal
from on_device.learning import MODEL, batches, learn, policy_of
from on_device.servers import CAN_SLEEP, FP8, NEW_TOKENS, small_server, takes_weights
from on_device.syncs import TRANSPORTS, syncs

from exprl_megatron.config.policy import Layout
from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.policy.world import enter_world, leave_world
from exprl_megatron.serving.server_process import start_servers, stop_servers

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """An FP8 server, and one that can sleep, side by side on the first GPU."""
    logs = tmp_path_factory.mktemp("logs")
    specs = [small_server("fp8", MODEL, logs, 0, *FP8), small_server("bf16", MODEL, logs, 0, *CAN_SLEEP)]
    started = start_servers(specs)
    yield {server.name: server for server in started}
    stop_servers(started)


def test_an_fp8_server_takes_the_policy_s_bf16_weights(servers, tmp_path, check):
    prompts = [sequence.prompt_ids for sequence in batches(1)[0]]
    precision = PrecisionConfig(kind="bf16")
    enter_world(Layout())
    try:
        policy = policy_of(precision)
        learn(precision, 20, policy)
        check(takes_weights(servers["fp8"], policy, prompts, tmp_path / "sync"))
    finally:
        leave_world()


def test_a_server_sleeps_and_wakes(servers, check):
    prompt = batches(1)[0][0].prompt_ids

    async def run():
        async with servers["bf16"].client() as client:
            before = await client.generate(prompt, temperature=0.0, max_new_tokens=NEW_TOKENS, seed=0)
            awake = torch.cuda.mem_get_info()[0]
            await client.sleep()
            asleep = torch.cuda.mem_get_info()[0]
            await client.wake()
            await client.update_from_disk(MODEL, "again")
            after = await client.generate(prompt, temperature=0.0, max_new_tokens=NEW_TOKENS, seed=0)
            return before.token_ids, after.token_ids, (asleep - awake) / 2**30

    before, after, freed = asyncio.run(run())
    check([at_least("sleep: GiB given up", freed, 1.0), equal("wake: greedy tokens as before", after == before, True)])


@pytest.mark.parametrize(
    ("layout", "cumem"),
    [
        pytest.param({}, None, marks=pytest.mark.gpus(2), id="TP1"),
        pytest.param({}, "0", marks=pytest.mark.gpus(2), id="TP1, NCCL_CUMEM_ENABLE=0"),
        pytest.param({}, "1", marks=pytest.mark.gpus(2), id="TP1, NCCL_CUMEM_ENABLE=1"),
        pytest.param({"pp": 2}, None, marks=pytest.mark.gpus(3), id="PP2"),
        pytest.param({"tp": 2, "pp": 2}, None, marks=pytest.mark.gpus(5), id="TP2xPP2"),
    ],
)
def test_syncs_over_nccl_to_servers_that_never_come_and_that_die(tmp_path, monkeypatch, check, layout, cumem):
    """With the user's NCCL_CUMEM_ENABLE, or none, for trainer and servers alike."""
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    if cumem is not None:
        monkeypatch.setenv("NCCL_CUMEM_ENABLE", cumem)
    ranks = Layout(**layout).world_size
    specs = [small_server(f"policy-{i}", MODEL, tmp_path / "logs", ranks) for i in range(len(TRANSPORTS) + 1)]
    started = start_servers(specs)
    try:
        pairs = {kind: (started[i], started[i + 1]) for i, kind in enumerate(TRANSPORTS)}
        out = tmp_path / "out"
        check(syncs(out, MODEL, pairs, precision="bf16", deadline_s=30.0, layout=Layout(**layout)))
    finally:
        stop_servers(started)
