"""No two samples of a step are seeded alike, however often a problem is drawn for it."""

import asyncio
from types import SimpleNamespace

from exprl_megatron.config.serving import SamplingConfig
from exprl_megatron.rollout.sampler import Prompt, sample_groups, sample_seed


class Server:
    """Answers every request, and keeps the seeds."""

    name, url = "policy-0", "http://nowhere"

    def __init__(self):
        self.seeds = []

    async def ask(self, home, request):
        return await request(self)

    async def read(self, token_ids):
        pass

    async def generate(self, token_ids, seed, **sampling):
        self.seeds.append(seed)
        return SimpleNamespace(
            token_ids=(1,),
            log_probs=(-1.0,),
            text="a",
            finish_reason="stop",
            weight_versions=(("1", 0, 1),),
            cached_tokens=0,
        )


def _seeds(prompts, group_size):
    server = Server()
    groups = asyncio.run(
        sample_groups(
            server,
            prompts,
            group_size,
            SamplingConfig(),
            lambda problem, k: sample_seed(0, "prime", 1, problem, k),
            weight_versions=["1"],
        )
    )
    assert [len(group) for group in groups] == [group_size] * len(prompts)
    return server.seeds


def test_copies_of_a_problem_in_a_step_have_seeds_of_their_own():
    seeds = _seeds([Prompt(f"p{i % 5}", (1, 2), i // 5) for i in range(16)], 4)
    assert len(set(seeds)) == 16 * 4


def test_a_problem_that_is_drawn_once_keeps_its_seeds():
    assert _seeds([Prompt("p", (1, 2))], 3) == [sample_seed(0, "prime", 1, "p", k) for k in range(3)]
