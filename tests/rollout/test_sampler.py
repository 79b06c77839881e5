"""Sampling groups from a real server: order, seeds, hand-over of finished traces, failures."""

import asyncio
import hashlib

import pytest

from exprl_megatron.config.serving import SamplingConfig
from exprl_megatron.errors import ServerError
from exprl_megatron.rollout.sampler import Prompt, sample_groups, sample_seed
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.keys import authorization
from exprl_megatron.serving.static_pool import StaticPool

PROMPTS = [Prompt(f"p{i}", tuple(range(3 + i, 23 + i))) for i in range(5)]
# A quarter of the vocabulary stops a trace: some have one token, some dozens.
SHORT = SamplingConfig(max_new_tokens=40, stop_token_ids=tuple(range(0, 128, 4)))
LONG = SamplingConfig(max_new_tokens=900, temperature=5.0)


def seed_of(problem_id, k):
    return sample_seed(3, "prime", 7, problem_id, k)


class Watched(SGLangClient):
    """A client that notes what goes through it."""

    def __init__(self, server):
        super().__init__(server.url, server.name, server.log_file, 120, authorization(server.key_file))
        self.prompts = []
        self.running = 0
        self.cancelled = 0

    async def generate(self, input_ids, **settings):
        self.prompts.append(input_ids.tolist())
        self.running += 1
        try:
            return await super().generate(input_ids, **settings)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


def sample(clients, sampling, group_size, **settings):
    async def run():
        async with asyncio.timeout(100):
            for client in clients:
                await client.__aenter__()
            try:
                return await sample_groups(StaticPool(clients), PROMPTS, group_size, sampling, seed_of, **settings)
            finally:
                for client in clients:
                    await client.__aexit__()

    return asyncio.run(run())


def token_ids(groups) -> list[list[list[int]]]:
    return [[trace.token_ids.tolist() for trace in group] for group in groups]


@pytest.mark.slow
def test_groups_come_in_order_each_from_one_server_with_a_seed_for_each_sample(qwen3_server):
    one, two = Watched(qwen3_server), Watched(qwen3_server)
    groups = sample([one, two], SHORT, 3, weight_versions=["initial"])
    assert [[(t.problem_id, t.sample, t.prompt_ids.tolist()) for t in group] for group in groups] == [
        [(p.problem_id, k, p.token_ids.tolist()) for k in range(3)] for p in PROMPTS
    ]
    assert one.prompts == [PROMPTS[i].token_ids.tolist() for i in (0, 0, 0, 2, 2, 2, 4, 4, 4)]
    assert two.prompts == [PROMPTS[i].token_ids.tolist() for i in (1, 1, 1, 3, 3, 3)]
    traces = [trace for group in groups for trace in group]
    assert len({trace.token_ids.tobytes() for trace in traces}) > 10
    assert all(len(t.log_probs) == len(t.token_ids) and max(t.log_probs) <= 0 for t in traces)
    assert all(t.token_ids[-1] % 4 == 0 for t in traces if t.finish_reason == "stop")
    again = sample([Watched(qwen3_server)], SHORT, 3, weight_versions=["initial"])
    assert token_ids(again) == token_ids(groups)
    by_groups = sample([Watched(qwen3_server)], SHORT, 3, weight_versions=["initial"], group_requests=True)
    assert token_ids(by_groups) == token_ids(groups)


@pytest.mark.slow
def test_a_group_s_prompt_is_read_once_for_all_of_it(qwen3_server):
    asyncio.run(flushed(qwen3_server))
    groups = sample([Watched(qwen3_server)], SHORT, 4, weight_versions=["initial"])
    # The last token's logits are computed for each.
    assert {t.cached_tokens for group in groups for t in group} == {len(PROMPTS[0].token_ids) - 1}


async def flushed(server):
    async with server.client() as client:
        await client.flush_cache()


@pytest.mark.slow
def test_a_finished_trace_is_handed_on_while_others_are_still_written(qwen3_server):
    client = Watched(qwen3_server)
    still_running = []

    async def on_trace(trace):
        still_running.append(client.running)

    sample([client], SHORT, 8, weight_versions=["initial"], on_trace=on_trace)
    assert len(still_running) == 40
    assert still_running[0] > 0


@pytest.mark.slow
def test_no_more_groups_are_waited_for_than_are_wanted(qwen3_server):
    client = Watched(qwen3_server)
    ordinary = sample([Watched(qwen3_server)], SHORT, 2, weight_versions=["initial"])

    async def on_trace(trace):
        if trace.problem_id in ("p0", "p3"):
            await asyncio.sleep(3600)  # a judge that takes its time

    found = sample([client], SHORT, 2, weight_versions=["initial"], on_trace=on_trace, target_groups=3)
    assert [group[0].problem_id for group in found] == ["p1", "p2", "p4"]
    assert token_ids(found) == token_ids(ordinary[i] for i in (1, 2, 4))


@pytest.mark.slow
def test_a_trace_of_other_weights_is_an_error_that_cancels_the_rest(qwen3_server):
    client = Watched(qwen3_server)
    with pytest.raises(ServerError, match=r"policy-0 .* under weight version initial, not v9"):
        sample([client], SHORT, 8, weight_versions=["v9"])
    assert client.cancelled > 0 and client.running == 0


@pytest.mark.slow
def test_a_trace_cut_off_by_the_server_is_an_error(qwen3_server):
    client = Watched(qwen3_server)

    async def on_trace(trace):
        await client.pause("abort")
        # A request that the server has not received yet would wait for this.
        await client.continue_()

    try:
        with pytest.raises(ServerError, match=r"ended sample \d+ of problem p\d with 'abort'"):
            sample([client], LONG, 30, weight_versions=["initial"], on_trace=on_trace)
    finally:
        asyncio.run(_continue(qwen3_server))


async def _continue(server):
    async with server.client() as client:
        await client.continue_()


@pytest.mark.slow
def test_a_failure_of_the_one_who_takes_the_traces_is_raised_as_it_is(qwen3_server):
    client = Watched(qwen3_server)

    async def on_trace(trace):
        raise LookupError(trace.problem_id)

    with pytest.raises(LookupError, match="p"):
        sample([client], SHORT, 8, weight_versions=["initial"], on_trace=on_trace)
    assert client.cancelled > 0


def test_seeds_differ_in_every_part_and_are_31_bits():
    base = (3, "prime", 7, "p0", 1)
    others = [(4, "prime", 7, "p0", 1), (3, "rl", 7, "p0", 1), (3, "prime", 8, "p0", 1), (3, "prime", 7, "p1", 1)]
    others.append((3, "prime", 7, "p0", 2))
    assert len({sample_seed(*key) for key in [base, *others]}) == 6
    seeds = [sample_seed(0, "s", 0, f"p{i}", 0) for i in range(2000)]
    assert all(0 <= s < 2**31 for s in seeds) and max(seeds) > 2**30
    digest = hashlib.sha256(b"(3, 'prime', 7, 'p0', 1)").hexdigest()
    assert sample_seed(*base) == int(digest[:8], 16) // 2
