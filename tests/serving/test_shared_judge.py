"""The policy's servers as judge: only answers of the judge's weights count, whatever the servers hold meanwhile."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from exprl_megatron.errors import ServerError
from exprl_megatron.serving.shared_judge import JUDGE_VERSION, SharedJudgeClient


class Pool:
    """Servers that hold the judge's weights once these are loaded; after each of `syncs` requests the policy's."""

    def __init__(self, syncs=0, wrong=False):
        self.version, self.loads, self.homes = "v3", [], []
        self.syncs, self.wrong = syncs, wrong

    async def load_judge_weights(self, model, version, deadline_s):
        if self.version != version:
            self.loads.append((model, version, deadline_s))
            self.version = version

    async def ask(self, home, call):
        self.homes.append(home)
        if self.syncs:
            # The trainer sends its weights before the request arrives.
            self.syncs, self.version = self.syncs - 1, "v4"
        return await call(self)

    name, url = "policy-0", "http://nowhere"

    async def generate(self, input_ids, **keywords):
        version = "v3" if self.wrong else self.version
        return SimpleNamespace(weight_versions=((version, 0, 1),), text=f"under {version}")

    async def generate_all(self, prompts, seeds, **keywords):
        return [await self.generate(prompt) for prompt in prompts]


def client_of(pool):
    return SharedJudgeClient(pool, Path("judge"), 2, 9.0)


@pytest.mark.parametrize("syncs", [0, 1, 2])
def test_an_answer_of_the_policys_weights_is_asked_for_again_under_the_judges(syncs):
    pool = Pool(syncs)
    assert asyncio.run(client_of(pool).generate([1])).text == f"under {JUDGE_VERSION}"
    assert pool.loads == [(Path("judge"), JUDGE_VERSION, 9.0)] * (1 + syncs)
    assert pool.homes == [2] * (1 + syncs)


def test_several_answers_count_only_where_all_are_of_the_judges_weights():
    pool = Pool(1)
    found = asyncio.run(client_of(pool).generate_all([[1], [2]], [3, 4]))
    assert [one.text for one in found] == [f"under {JUDGE_VERSION}"] * 2 and len(pool.loads) == 2


def test_a_server_that_answers_under_others_than_it_was_given_has_failed():
    with pytest.raises(ServerError, match=r"policy-0 .* did not generate under the judge's weights"):
        asyncio.run(client_of(Pool(wrong=True)).generate([1]))
