"""A stage of the user's own is tried before a run starts, on empty traces; a reference in a prompt is found there."""

import json
import sys
import textwrap

import pytest

from exprl_megatron.config.load import check_config, load_config
from exprl_megatron.errors import UserError
from exprl_megatron.launch.plugin_checks import plugin_hashes, plugins_of
from exprl_megatron.launch.preflight import check_inputs, dry_run
from exprl_megatron.plugins.failures import PluginError

SECRET = "first add seven to nine and then halve whatever comes out of it"
PROBLEMS = [
    {"id": f"p{i}", "problem": f"What is {i} plus 1?", "answer": f"{i + 1}"}
    | {"reference": SECRET if i == 1 else f"{i + 1}."}
    for i in range(4)
]

PROMPTS = {"prompt": "miniature", "prefix_prompt": "miniature"}


@pytest.fixture
def run(tmp_path, monkeypatch, tiny_model):
    """`run(body, *more, **stage)`: a config with a stage of the class `Mine`, whose methods are `body`."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def make(body: str, *more: dict, **stage):
        sys.modules.pop("mine_stage", None)
        header = "from exprl_megatron.api import *\nclass Mine(CustomStage):\n"
        code = header + textwrap.indent(textwrap.dedent(body).strip() or "pass", "    ") + "\n"
        (tmp_path / "mine_stage.py").write_text(code)
        shared = {
            "problems": {"source": str(problems)},
            "problems_per_step": 2,
            "group_size": 4,
            "steps": 1,
            "sampling": {"max_new_tokens": 16},
        }
        stages = [{"kind": "mine_stage:Mine", "name": "a"} | shared | stage, *(shared | one for one in more)]
        tree = {
            "directory": str(tmp_path / "run"),
            "plugin_path": [str(tmp_path)],
            "policy": {"model": str(tiny_model("qwen3")), "max_tokens": 128},
            "judge": {
                "model": str(tiny_model("qwen3")),
                "prompt": "miniature",
                "prefix_prompt": "miniature",
                "max_new_tokens": 8,
            },
            "stages": stages,
        }
        return check_config(tree, "test")

    yield make
    sys.modules.pop("mine_stage", None)


ALL_HOOKS = """
async def rollout(self, ctx):
    found = await ctx.sample(ctx.next_problems(), prompt=lambda problem: problem.statement + " Think.")
    assert all(sample.score in (0.0, 1.0) for group in found for sample in group.samples)
    await ctx.verify(found[0].samples[0].trace)
    return found
def learn(self, ctx, groups):
    self.settings = {"seen": [group.problem_id for group in groups]}
    return ctx.default_learn(groups)
def kept_problems(self): return self.settings["seen"]
def state_dict(self): return dict(self.settings)
def load_state_dict(self, state): self.settings = state
"""


@pytest.mark.parametrize("base", ["sparse-rl", "exprl-outcome", "exprl-process"])
@pytest.mark.parametrize("body", ["", ALL_HOOKS])
def test_a_stage_is_tried_over_each_base(run, base, body):
    config = run(body, base=base)
    check_inputs(config)
    assert plugins_of(config) == {"stages.0.kind": "mine_stage:Mine"}
    assert list(plugin_hashes(config)) == ["plugins.mine_stage:Mine"]


def test_a_stage_with_a_mixture_of_rewards_and_a_later_one_that_takes_what_it_kept(run):
    terms = [{"term": "verifier"}, {"term": "length", "weight": -0.1}]
    check_inputs(run(ALL_HOOKS, {"kind": "sparse-rl", "name": "b", "problems_from": "a"}, reward=terms))


def test_the_examples_pass_the_checks_of_a_start():
    check_inputs(load_config("examples/custom_stages.yaml"))


def test_a_second_attempt_passes_them_too(run):
    config = run("").model_dump(mode="json")
    config["stages"][0] |= {"kind": "examples.stages:SecondAttempt"}
    check_inputs(check_config(config, "test"))


@pytest.mark.parametrize("place", [0, 1])
def test_a_reference_that_is_put_into_a_prompt_is_found_before_anything_is_started(run, place):
    body = f"""
        async def rollout(self, ctx):
            return await ctx.sample(ctx.problems[{place}:{place + 1}], prompt=lambda p: p.statement + " {SECRET}")
    """
    with pytest.raises(UserError, match=f"Leak guard: a request to the policy for problem p{place} shares") as found:
        check_inputs(run(body))
    assert SECRET not in str(found.value)


CORRECTED = {"loss": {"correction": {"kind": "truncated"}}}


@pytest.mark.parametrize(
    ("body", "stage", "said"),
    [
        ("def learn(self, ctx, groups): return groups[0].x", {}, "py, line 3, in learn: AttributeError"),
        ("async def rollout(self, ctx): return ctx.problems[0].reference", {}, "no attribute 'reference'"),
        ("async def rollout(self, ctx): return await ctx.judge(3)", {}, "the trace was not sampled in this step"),
        ("def state_dict(self): return {1: 2}", {}, "has a state_dict that JSON does not keep"),
        ("def load_state_dict(self, state): raise OSError('gone')", {}, "line 3, in load_state_dict: OSError: gone"),
        ("def kept_problems(self): return ['x']", {}, "kept the problem 'x'"),
        ("def __init__(self, settings): self.a = settings['a']", {}, "in __init__: KeyError: 'a'"),
        ("", {"objective": "supervised"}, "objective is supervised, which has no default"),
        ("", {"kind": "mine_stage:Other"}, "defines no Other"),
        (ALL_HOOKS, {"max_staleness": 1} | CORRECTED, "whose steps follow each other"),
    ],
)
def test_what_is_wrong_with_a_stage_is_one_sentence_with_its_place(run, body, stage, said):
    with pytest.raises(PluginError, match=said):
        dry_run(run(body, **stage))


def test_only_a_class_that_keeps_problems_can_keep_them_for_others(run):
    with pytest.raises(PluginError, match="stage b: problems_from is a, whose class has no kept_problems"):
        dry_run(run("", {"kind": "sparse-rl", "name": "b", "problems_from": "a"}))


def test_a_judge_on_the_policys_servers_and_a_rollout_of_its_own_exclude_each_other(run):
    config = run(ALL_HOOKS, base="exprl-outcome")
    judge = config.judge.model_copy(update={"placement": "policy"})
    with pytest.raises(PluginError, match=r"judge\.placement is policy; set it to own"):
        dry_run(config.model_copy(update={"judge": judge}))
