"""No code of the user brings a reference into a request to the policy, whatever it does to what it is given."""

import asyncio
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from exprl_megatron.config.load import check_config
from exprl_megatron.errors import RunStopped
from exprl_megatron.models.tokenizer import load_tokenizer
from exprl_megatron.plugins.loading import load_plugin
from exprl_megatron.rollout.custom_functions import custom_verifiers
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.training import graded_sampling
from exprl_megatron.training.custom_rewards import custom_terms
from exprl_megatron.training.grading import verified, with_terms
from exprl_megatron.training.run_problems import RunProblems

SECRET = "the hidden solution says that the sum of both numbers is certainly four in the end"
HOSTILE = """
from exprl_megatron.api import Scored

def take(problem):
    reference = problem.reference.for_judge()
    for name in ("text", "id", "choices"):
        object.__setattr__(problem, name, (reference,) if name == "choices" else reference)
    return reference

def verify(problem, trace):
    return Scored(1.0, take(problem) if problem.reference else "")

def term(problem, trace):
    take(problem)
    object.__setattr__(trace, "prompt_ids", trace.token_ids)
    object.__setattr__(trace, "problem_id", "other")
    return 1.0
"""


@pytest.fixture
def sampling(tmp_path, monkeypatch, tiny_model):
    """`sampling(record)`: rollouts on one problem, the texts of their requests, and a grade by hostile code."""
    monkeypatch.syspath_prepend(str(tmp_path))
    load_plugin.cache_clear()
    (tmp_path / "hostile_code.py").write_text(HOSTILE)
    sent: list[str] = []

    def make(record: dict, **leak_guard):
        (tmp_path / "problems.jsonl").write_text(json.dumps(record) + "\n")
        stage = {
            "kind": "sparse-rl",
            "name": "a",
            "steps": 2,
            "problems": {"source": str(tmp_path / "problems.jsonl")},
            "problems_per_step": 1,
            "group_size": 2,
            "sampling": {"max_new_tokens": 16},
            "reward": [{"term": "verifier"}, {"term": "hostile_code:term"}],
        }
        tree = {
            "directory": str(tmp_path / "run"),
            "policy": {"model": str(tiny_model("qwen3")), "max_tokens": 512},
            "verifier": {"domains": {"math": "hostile_code:verify"}},
            "leak_guard": leak_guard,
            "stages": [stage],
        }
        config = check_config(tree, "test")
        console = SimpleNamespace(
            say=print, rollouts=lambda *shown: nullcontext(SimpleNamespace(sampled=lambda: None, graded=lambda: None))
        )
        tokenizer = load_tokenizer(config.policy.model)
        problems = RunProblems(config, tokenizer, console)
        problems.prepare()
        sampler = graded_sampling.GradedSampler(config, problems, tokenizer, None, None, console)

        async def sample(fleet, prompts, group_size, *further, on_trace, **named):
            sent.extend(tokenizer.decode(prompt.token_ids.tolist()) for prompt in prompts)
            traces = [
                Trace(p.problem_id, k, p.token_ids, (5,), (-0.5,), "4", "stop", ()) for p in prompts for k in (0, 1)
            ]
            for trace in traces:
                await on_trace(trace)
            return [traces]

        monkeypatch.setattr(graded_sampling, "sample_groups", sample)
        (stage,) = config.stages
        by_answer = verified(None, config.verifier, custom_verifiers(config.verifier, print))
        grade = with_terms(stage, by_answer, custom_terms("a", stage.reward, 5.0, print))

        def step(number: int):
            plan = graded_sampling.SamplePlan(("a", number), stage.problems, [0], 2, stage.sampling, ["v0"])
            return asyncio.run(sampler.sample(plan, grade))

        return step

    yield make, sent
    load_plugin.cache_clear()


def test_code_that_writes_the_reference_into_the_problem_changes_no_prompt(sampling):
    make, sent = sampling
    step = make({"id": "p", "problem": "What is 2 plus 2?", "reference": SECRET, "answer": "4"})
    for number in (1, 2):
        step(number)
    assert len(sent) == 2 and sent[0] == sent[1] and "2 plus 2" in sent[0]
    assert not any("hidden" in text for text in sent)


def test_the_leak_guard_stops_a_problem_whose_own_text_has_the_canary_of_a_reference(sampling):
    make, sent = sampling
    step = make({"id": "p", "problem": "Hint: canary-7 " + SECRET, "reference": SECRET}, canary="canary-7")
    with pytest.raises(RunStopped, match="canary"):
        step(1)
    assert sent == []
