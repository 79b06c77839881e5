"""No two samples of a step are seeded alike, however often a problem is drawn for it and however they are asked for."""

import asyncio
from collections import Counter
from types import SimpleNamespace

import pytest

from exprl_megatron.config.serving import SamplingConfig
from exprl_megatron.errors import ServerError
from exprl_megatron.rollout.sampler import MAX_STARTS_PER_PASS, Prompt, sample_groups, sample_seed


class Server:
    """Answers every request, and keeps the seeds."""

    name, url = "policy-0", "http://nowhere"

    def __init__(self, version="1"):
        self.seeds, self.requests, self.version = [], [], version

    async def ask(self, home, request):
        return await request(self)

    async def prefill(self, token_ids):
        pass

    async def generate(self, token_ids, seed, **sampling):
        self.requests.append(sampling)
        return self._written(seed)

    async def generate_all(self, prompts, seeds, **sampling):
        assert all(prompt is prompts[0] for prompt in prompts)
        self.requests.append(sampling)
        return [self._written(seed) for seed in seeds]

    def _written(self, seed):
        self.seeds.append(seed)
        return SimpleNamespace(
            token_ids=(seed % 97,),
            log_probs=(-1.0,),
            text="a",
            finish_reason="stop",
            weight_versions=((self.version, 0, 1),),
            cached_tokens=0,
            routed_experts=None,
        )


def _sampled(server, prompts, group_size, **settings):
    return asyncio.run(
        sample_groups(
            server,
            prompts,
            group_size,
            SamplingConfig(),
            lambda problem, k: sample_seed(0, "prime", 1, problem, k),
            weight_versions=["1"],
            **settings,
        )
    )


def _seeds(prompts, group_size):
    server = Server()
    groups = _sampled(server, prompts, group_size)
    assert [len(group) for group in groups] == [group_size] * len(prompts)
    return server.seeds


def test_copies_of_a_problem_in_a_step_have_seeds_of_their_own():
    seeds = _seeds([Prompt(f"p{i % 5}", (1, 2), i // 5) for i in range(16)], 4)
    assert len(set(seeds)) == 16 * 4


def test_a_problem_that_is_drawn_once_keeps_its_seeds():
    assert _seeds([Prompt("p", (1, 2))], 3) == [sample_seed(0, "prime", 1, "p", k) for k in range(3)]


def test_whole_groups_are_one_request_each_and_the_same_traces_as_one_by_one():
    prompts = [Prompt(f"p{i % 3}", (1, 2), i // 3) for i in range(5)]
    alone, whole, handed_on = Server(), Server(), []

    async def on_trace(trace):
        handed_on.append((trace.problem_id, trace.sample))

    one_by_one = _sampled(alone, prompts, 4)
    together = _sampled(whole, prompts, 4, group_requests=True, on_trace=on_trace)
    assert len(alone.requests) == 20 and len(whole.requests) == 5
    assert whole.requests[0] == alone.requests[0] == SamplingConfig().model_dump()
    assert sorted(whole.seeds) == sorted(alone.seeds)

    def content(groups):
        return [[(t.problem_id, t.sample, t.token_ids.tolist()) for t in group] for group in groups]

    assert content(together) == content(one_by_one)
    assert handed_on == [(prompt.problem_id, k) for prompt in prompts for k in range(4)]


def test_a_whole_group_of_other_weights_is_an_error():
    with pytest.raises(ServerError, match="sampled trace 0 of problem p under weight version 2, not 1"):
        _sampled(Server(version="2"), [Prompt("p", (1, 2))], 3, group_requests=True)


def begun_by_pass() -> Counter[int]:
    """How many of 500 requests begin in each pass of the event loop."""
    begun: Counter[int] = Counter()
    turn = 0

    class Counting(Server):
        async def ask(self, home, request):
            begun[turn] += 1
            return await request(self)

    async def sampled():
        async def count_passes():
            nonlocal turn
            while True:
                await asyncio.sleep(0)
                turn += 1

        counting = asyncio.create_task(count_passes())
        prompts = [Prompt(f"p{i}", (1, 2)) for i in range(100)]
        await sample_groups(Counting(), prompts, 4, SamplingConfig(), lambda problem, k: k, weight_versions=["1"])
        counting.cancel()

    asyncio.run(sampled())
    return begun


def test_a_few_requests_begin_in_each_pass_of_the_event_loop():
    begun = begun_by_pass()
    # Some of a pass's are counted with the next one's, by their place in it.
    assert begun.total() == 500 and max(begun.values()) <= 2 * MAX_STARTS_PER_PASS


def test_fewer_requests_begin_while_passes_of_the_event_loop_take_long(monkeypatch):
    monkeypatch.setattr("exprl_megatron.rollout.sampler._LONG_PASS_S", -1.0)
    begun = begun_by_pass()
    assert begun.total() == 500 and len(begun) > 200
