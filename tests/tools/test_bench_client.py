"""tools/bench_client.py: both sides send the same load."""

import asyncio

import bench_client
import pytest
from benchmarks.client_load import Load, Place, ServedModel, through_bench_serving, through_our_client


@pytest.mark.slow
def test_the_prompts_are_those_of_bench_serving(qwen3_server, tmp_path):
    load = Load(8, 12, 5)
    prompts = load.prompts(bench_client.MODEL)
    assert len({tuple(prompt) for prompt in prompts}) == 8
    before = asyncio.run(cached_tokens(qwen3_server, prompts[0]))
    through_bench_serving(place(qwen3_server), bench_client.MODEL, load, False, tmp_path)
    # What was sent is in the radix cache now; the last token is always computed.
    assert (before, asyncio.run(cached_tokens(qwen3_server, prompts[7]))) == (0, 11)


@pytest.mark.slow
def test_our_side_counts_requests_and_their_tokens(qwen3_server):
    load = Load(4, 6, 3)
    served = asyncio.run(through_our_client(place(qwen3_server), load.prompts(bench_client.MODEL), load.sampling))
    assert served.requests == 4 and 4 <= served.output_tokens <= 12
    assert ServedModel(2.0, 4, 12).requests_per_s == 2.0


def place(server) -> Place:
    return Place(server.url, str(server.key_file))


async def cached_tokens(server, prompt):
    async with server.client() as client:
        generation = await client.generate(prompt, temperature=1.0, max_new_tokens=1, seed=0)
    return generation.cached_tokens
