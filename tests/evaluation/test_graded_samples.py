"""How `exprl eval` samples and verifies one problem: seeds, weights, deadlines, and whose verdict is whose."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from exprl_megatron.errors import ServerError
from exprl_megatron.evaluation.eval_config import EvalConfig
from exprl_megatron.evaluation.evaluate import WEIGHT_VERSION, _graded
from exprl_megatron.judging.judgement import Scored
from exprl_megatron.problems.problem import Problem
from exprl_megatron.rollout.sampler import Prompt, sample_seed
from exprl_megatron.serving.generation import Generation


class Client:
    """Writes the number of each sample; the first one takes the longest."""

    name, url = "policy-0", "http://nowhere"

    def __init__(self, version=WEIGHT_VERSION):
        self.version, self.seeds, self.sampling = version, [], []

    async def prefill(self, token_ids):
        pass

    async def generate(self, token_ids, seed, **sampling):
        number = len(self.seeds)
        self.seeds.append(seed)
        self.sampling.append(sampling)
        for _ in range(20 - 5 * number):
            await asyncio.sleep(0)
        return Generation(
            token_ids=np.array([number], np.int32),
            log_probs=np.array([-1.0], np.float32),
            text=f"sample {number}",
            finish_reason="stop",
            weight_versions=((self.version, 0, 1),),
            prompt_tokens=2,
            cached_tokens=0,
        )


class Verifier:
    """Finds sample 1 right and the others wrong."""

    def __init__(self):
        self.deadlines = []

    async def verify(self, problem, text, deadline_s):
        self.deadlines.append(deadline_s)
        return Scored(float(text == "sample 1"))


def graded(client, verifier, domain="math"):
    settings = EvalConfig.model_validate(
        {
            "model": "m",
            "problems": {"source": "p"},
            "directory": "d",
            "samples": 3,
            "k": (1,),
            "seed": 5,
            "sampling": {"temperature": 0.6, "max_new_tokens": 16},
            "verifier_deadline_s": 3.0,
            "program_deadline_s": 40.0,
        }
    )
    question = SimpleNamespace(problem=Problem("p", "?", domain=domain, answer="1"), prompt=Prompt("p", (1, 2)))
    return asyncio.run(_graded(settings, client, question, verifier, {}))


def test_each_sample_has_its_own_verdict_in_whichever_order_they_are_finished():
    client = Client()
    found = graded(client, Verifier())
    assert [(one.trace.sample, one.trace.text, one.score) for one in found] == [
        (0, "sample 0", 0.0),
        (1, "sample 1", 1.0),
        (2, "sample 2", 0.0),
    ]
    assert client.seeds == [sample_seed(5, "evaluation", 0, "p", k) for k in range(3)], "those of a run's evaluation"
    assert all(sampling["temperature"] == 0.6 and sampling["max_new_tokens"] == 16 for sampling in client.sampling)


@pytest.mark.parametrize(("domain", "deadline_s"), [("math", 3.0), ("code", 40.0)])
def test_a_program_has_its_own_deadline(domain, deadline_s):
    verifier = Verifier()
    graded(Client(), verifier, domain)
    assert verifier.deadlines == [deadline_s] * 3


def test_samples_of_other_weights_than_the_models_are_refused():
    with pytest.raises(ServerError, match="under weight version v3, not initial"):
        graded(Client("v3"), Verifier())
