"""A trace is taken only where every token of it was sampled under weights that the caller allows."""

import asyncio
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from exprl_megatron.config.serving import SamplingConfig
from exprl_megatron.errors import ServerError
from exprl_megatron.models.routing import Routing
from exprl_megatron.rollout.sampler import Prompt, sample_groups


class Server:
    """Writes two tokens, under the weights that it is made with."""

    name, url = "policy-0", "http://nowhere"

    def __init__(self, spans, finish="stop", cached=0):
        self.spans, self.finish, self.cached = spans, finish, cached

    async def ask(self, home, request):
        return await request(self)

    async def generate(self, token_ids, seed, **sampling):
        return SimpleNamespace(
            token_ids=(5, 6),
            log_probs=(-1.0, -2.0),
            text="two",
            finish_reason=self.finish,
            weight_versions=self.spans,
            cached_tokens=self.cached,
            routed_experts=None,
        )


def sampled(server, *versions, routing=None):
    prompts = [Prompt("p", (1, 2, 3))]
    ((trace,),) = asyncio.run(
        sample_groups(
            server, prompts, 1, SamplingConfig(), lambda problem, k: 0, weight_versions=versions, routing=routing
        )
    )
    return trace


MIXED = (("v1", 0, 1), ("v2", 1, 2))
ROUTING = Routing(layers=1, top_k=2, experts=3)


class Routed(Server):
    """Returns the experts of so many tokens too, where they are asked for."""

    def __init__(self, rows):
        super().__init__((("v1", 0, 2),))
        self.experts = np.tile(np.array([[[2, 1]]], np.uint8), (rows, 1, 1))

    async def generate(self, token_ids, seed, routing=None, **sampling):
        generation = await super().generate(token_ids, seed)
        generation.routed_experts = None if routing is None else self.experts
        return generation


def test_a_trace_keeps_the_experts_of_all_tokens_but_the_last_where_they_are_asked_for():
    assert sampled(Routed(4), "v1").routed_experts is None
    assert sampled(Routed(4), "v1", routing=ROUTING).routed_experts.tolist() == [[[2, 1]]] * 4
    for rows in (3, 5):
        with pytest.raises(ServerError, match=rf"returned the experts of {rows} tokens for sample 0 .*5 tokens have 4"):
            sampled(Routed(rows), "v1", routing=ROUTING)


def test_a_trace_keeps_what_the_server_said_of_each_token():
    trace = sampled(Server(MIXED, cached=9), "v1", "v2", "v3")
    assert (trace.weight_versions, trace.token_ids.tolist(), trace.log_probs.tolist()) == (MIXED, [5, 6], [-1.0, -2.0])
    assert (trace.problem_id, trace.sample, trace.prompt_ids.tolist()) == ("p", 0, [1, 2, 3])
    assert trace.cached_tokens == 3, "no more than the prompt has"


@pytest.mark.parametrize(
    ("spans", "allowed", "named"),
    [
        (MIXED, ("v2",), "v1, v2, not v2"),
        (MIXED, ("v1",), "v1, v2, not v1"),
        ((("v3", 0, 2),), ("v1", "v2"), "v3, not v1 or v2"),
        ((), ("v1",), "none, not v1"),
    ],
)
def test_one_token_of_other_weights_or_of_unknown_ones_is_refused(spans, allowed, named):
    with pytest.raises(ServerError, match=f"policy-0 .* sampled trace 0 of problem p under weight version {named}"):
        sampled(Server(spans), *allowed)


def test_a_trace_that_the_server_ended_early_is_refused():
    with pytest.raises(ServerError, match="ended sample 0 of problem p with 'abort' after 2 tokens"):
        sampled(Server(MIXED, finish="abort"), "v1", "v2")


def test_all_requests_about_a_prompt_prefer_one_server_and_the_prompts_are_spread_over_all():
    class Spread(Server):
        homes: ClassVar[dict] = {}

        async def ask(self, home, request):
            self.home = home
            return await request(self)

        async def prefill(self, token_ids):
            self.homes.setdefault(token_ids[0], set()).add(self.home)

        async def generate(self, token_ids, seed, **sampling):
            self.homes[token_ids[0]].add(self.home)
            return await super().generate(token_ids, seed, **sampling)

    prompts = [Prompt(f"p{i}", (i, 2, 3)) for i in range(3)]
    server = Spread((("v1", 0, 2),))
    groups = sample_groups(server, prompts, 2, SamplingConfig(), lambda problem, k: k, weight_versions=["v1"])
    assert [len(group) for group in asyncio.run(groups)] == [2, 2, 2]
    assert server.homes == {0: {0}, 1: {1}, 2: {2}}
