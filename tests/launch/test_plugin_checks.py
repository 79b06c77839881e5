"""The user's own code is tried before a run starts; what is wrong with it is one sentence with file and line."""

import json
import sys
import textwrap

import pytest

from exprl_megatron.config.load import check_config
from exprl_megatron.errors import UserError
from exprl_megatron.launch.plugin_checks import plugin_hashes, plugins_of
from exprl_megatron.launch.preflight import check_inputs, dry_run
from exprl_megatron.plugins.failures import PluginError
from exprl_megatron.plugins.loading import load_plugin
from exprl_megatron.runs.directory import RunDirectory

PROBLEMS = (
    {"id": "a", "problem": "1 + 1?", "reference": "It is 2.", "answer": "2"},
    {"id": "b", "problem": "How long?", "reference": "Two meters.", "answer": "2.0", "domain": "measured"},
)
GOOD = """
async def verify(problem, trace): return Scored(float(trace.text == problem.answer))
def term(problem, trace): return len(trace.text)
def estimate(rewards, valid): return rewards - rewards.mean(-1, keepdim=True)
def surrogate(batch): return -batch.advantages * batch.log_probs
def metrics(step, groups): return {"traces": sum(len(group.samples) for group in groups)}
"""


@pytest.fixture
def run(tmp_path, monkeypatch, tiny_model):
    """`run(body, **stage)`: a config whose plugins are those of `body`, which is the module `mine` in `code`."""
    (tmp_path / "code").mkdir()
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def make(body: str, model=None, deadline_s: float = 60.0, **stage):
        load_plugin.cache_clear()
        sys.modules.pop("mine", None)
        header = "import time\nimport torch\nfrom exprl_megatron.api import Abstained, Scored\n"
        (tmp_path / "code" / "mine.py").write_text(header + textwrap.dedent(body))
        shared = {
            "problems": {"source": str(problems), "domains": ["measured"]},
            "sampling": {"max_new_tokens": 16},
            "reward": [{"term": "verifier"}, {"term": "mine:term", "weight": 0.5}],
            "advantage": "mine:estimate",
            "loss": {"surrogate": "mine:surrogate", "dual_clip": None},
        }
        tree = {
            "directory": str(tmp_path / "run"),
            "plugin_path": [str(tmp_path / "code")],
            "policy": {"model": str(model or tiny_model("qwen3")), "max_tokens": 128},
            "step_metrics": ["mine:metrics"],
            "verifier": {"domains": {"measured": "mine:verify"}, "answer_deadline_s": deadline_s},
            "stages": [{"kind": "sparse-rl", "name": "a", "steps": 1} | shared | stage],
        }
        return check_config(tree, "test")

    yield make
    sys.modules.pop("mine", None)
    load_plugin.cache_clear()


def test_all_kinds_of_plugins_pass(run):
    config = run(GOOD)
    check_inputs(config)
    assert plugins_of(config) == {
        "verifier.domains.measured": "mine:verify",
        "step_metrics.0": "mine:metrics",
        "stages.0.reward.1.term": "mine:term",
        "stages.0.advantage": "mine:estimate",
        "stages.0.loss.surrogate": "mine:surrogate",
    }


@pytest.mark.parametrize(
    ("name", "body", "sentence"),
    [
        ("verify", "def verify(problem): return Scored(1.0)", r"takes other arguments than \(problem, trace\)"),
        ("verify", "def verify(problem, trace): return 1.0", "returned a float instead of Scored or Abstained"),
        ("verify", "def verify(problem, trace): return {}[trace.text]", "line 4, in verify: KeyError: ''"),
        ("verify", "async def verify(problem, trace): raise OSError('no route')", "in verify: OSError: no route"),
        ("verify", "def verify(problem, trace): time.sleep(30)", r"\(.*, line 4\) gave no answer within 1 s"),
        ("term", "def term(problem, trace, weight): return 1.0", r"takes other arguments than \(problem, trace\)"),
        ("term", "def term(problem, trace): return 'much'", "returned a str instead of a finite number"),
        (
            "term",
            "def term(problem, trace): return 1 / len(trace.text)",
            "in term: ZeroDivisionError: division by zero",
        ),
        ("estimate", "def estimate(rewards): return rewards", r"takes other arguments than \(scores, valid\)"),
        (
            "estimate",
            "def estimate(rewards, valid): return rewards.mean(-1)",
            r"a Tensor of the shape \(2,\) instead of",
        ),
        ("estimate", "def estimate(rewards, valid): return rewards.tolist()", "returned a list instead of a tensor"),
        ("estimate", "def estimate(rewards, valid): return rewards.masked_fill(valid, torch.inf)", "is not finite"),
        ("estimate", "def estimate(rewards, valid): return rewards @ valid", "line 4, in estimate: RuntimeError: "),
        (
            "estimate",
            "def estimate(rewards, valid): return rewards / rewards[valid].max()",
            "in estimate: RuntimeError",
        ),
        ("surrogate", "def surrogate(log_probs, advantages): pass", r"takes other arguments than \(batch\)"),
        ("surrogate", "def surrogate(batch): return batch.log_probs.mean()", r"a Tensor of the shape \(\) instead of"),
        ("surrogate", "def surrogate(batch): return batch.advantages", "returned a loss without a gradient"),
        ("metrics", "def metrics(groups): return {}", r"takes other arguments than \(step, groups\)"),
        ("metrics", "def metrics(step, groups): return 1.0", "returned a float instead of a mapping of names"),
        ("metrics", "def metrics(step, groups): return {'a': 'b'}", "returned 'a' as a str that is not a number"),
        (
            "metrics",
            "def metrics(step, groups): return {'A b': 1}",
            "returned the name 'A b'; use at most 60 lower-case",
        ),
        ("metrics", "def metrics(step, groups): return {'a': 1 / 0}", "line 4, in metrics: ZeroDivisionError"),
        ("surrogate", "def surrogate(batch): return batch.ratio", "AttributeError: 'SurrogateBatch' object has no"),
    ],
)
def test_a_plugin_that_would_fail_is_refused_before_the_run(run, name, body, sentence):
    others = "\n".join(line for line in GOOD.splitlines() if f"def {name}(" not in line)
    config = run(f"{body}\n{others}", deadline_s=1.0 if "sleep" in body else 60.0)
    with pytest.raises(PluginError, match=sentence) as refused:
        check_inputs(config)
    message = str(refused.value)
    assert f"mine:{name}" in message and "mine.py, line 4" in message and "\n" not in message


def test_a_dry_run_tries_code_also_where_the_models_are_elsewhere(run, tmp_path):
    assert "cannot be read here" in (dry_run(run(GOOD, model=tmp_path / "elsewhere")) or "")
    with pytest.raises(PluginError, match=r"mine\.py defines no estimate"):
        dry_run(run(GOOD.replace("def estimate(", "def estimates("), model=tmp_path / "elsewhere"))


def test_a_custom_domain_needs_its_verifier_only_where_the_reward_depends_on_it(run):
    config = run(GOOD)
    without = config.model_copy(update={"verifier": config.verifier.model_copy(update={"domains": {}})})
    with pytest.raises(UserError, match=r"1 of 1 measured problems have no verifier in verifier\.domains \(b\)"):
        check_inputs(without)
    (stage,) = without.stages
    custom_terms = stage.model_copy(update={"reward": stage.reward[1:]})
    check_inputs(without.model_copy(update={"stages": (custom_terms,)}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"advantage": "group-norm"}, r"0\.advantage is 'group-norm': input should be 'group-n.*mod"),
        ({"advantage": "mine.estimate"}, r"0\.advantage is 'mine\.estimate': input should be .* module:function"),
        ({"loss": {"surrogate": "PPO"}}, r"stages\.0\.loss\.surrogate is 'PPO': input should be 'clip', .*module:f"),
        ({"reward": [{"term": "format"}]}, r"0\.reward\.0\.term is 'format': input should be 'judge', 'ver"),
        ({"reward": [{"term": "judge"}]}, r"stage a: reward has the term judge, but no judge grades a stage"),
        ({"reward": [{"term": "m:f"}, {"term": "n:f"}]}, r"stage a: reward has two terms named f; give one of them"),
        ({"problems": {"source": "x.jsonl"}}, r"verifier\.domains has the domain 'measured', which is not one of math"),
    ],
)  # fmt: skip
def test_a_config_that_names_no_plugin_is_refused(run, changes, sentence):
    with pytest.raises(UserError, match=sentence) as refused:
        run(GOOD, **changes)
    assert len(str(refused.value).splitlines()) == 1


def test_a_resumed_run_says_that_the_source_of_a_plugin_has_changed_and_does_not_refuse_it(run, tmp_path):
    config, directory = run(GOOD), RunDirectory(tmp_path / "run")
    before = plugin_hashes(config) | {"policy.model": "m"}
    directory.claim(config, resume=False, contents=before).release()
    (directory.journal / "kept").write_text("a step")
    assert directory.changed_plugins(before) == []
    after = plugin_hashes(run(GOOD + "\n# another line")) | {"policy.model": "m"}
    sentences = directory.changed_plugins(after)
    assert [sentence.split()[3] for sentence in sentences] == [
        "mine:estimate",
        "mine:metrics",
        "mine:surrogate",
        "mine:term",
        "mine:verify",
    ]
    assert "the steps that follow use the new one" in sentences[0]
    directory.claim(config, resume=True, contents=after).release()
    assert directory.changed_plugins(after) == []
    with pytest.raises(UserError, match=r"The contents of policy\.model are others"):
        directory.claim(config, resume=True, contents=after | {"policy.model": "n"})
