"""`exprl doctor RUN` names each model and each problem file that the run needs, once."""

import json

import pytest

from exprl_megatron.commands import run_needs
from exprl_megatron.commands.doctor import NEEDED_BY_RUN
from exprl_megatron.commands.run_needs import needs_of


def test_models_of_policy_and_judge_and_each_file_of_problems_are_named_once(tmp_path):
    problems = {"source": str(tmp_path / "problems.jsonl")}
    stage = {"steps": 1, "problems": problems, "sampling": {"max_new_tokens": 16}}
    tree = {
        "directory": str(tmp_path / "run"),
        "policy": {"model": str(tmp_path / "policy")},
        "judge": {"model": str(tmp_path / "judge")},
        "stages": [stage | {"kind": "exprl-outcome"}, stage | {"kind": "sparse-rl"}],
        "evaluation": {"problems": problems | {"limit": 1}, "sampling": {"max_new_tokens": 16}},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    found = [(finding.part.removeprefix(NEEDED_BY_RUN), finding.ok) for finding in needs_of(str(tmp_path / "run.yaml"))]
    assert found == [("policy.model", False), ("judge.model", False), ("problems", False)]


@pytest.mark.parametrize(
    ("family", "cuda", "installed", "row"),
    [
        ("qwen3.5", True, False, [(False, "fla-core is not installed", "this run")]),
        ("qwen3.5", True, True, [(True, "fla-core", "")]),
        ("qwen3.5", False, False, []),
        ("qwen3", True, False, []),
    ],
)
def test_kernels_are_named_where_the_policy_needs_them(tiny_model, tmp_path, monkeypatch, family, cuda, installed, row):
    monkeypatch.setattr(run_needs, "uses_cuda", lambda: cuda)
    monkeypatch.setattr(run_needs, "has_delta_net_kernels", lambda: installed)
    stage = {"kind": "sft", "steps": 1, "problems": {"source": "problems.jsonl"}}
    tree = {"directory": str(tmp_path), "policy": {"model": str(tiny_model(family))}, "stages": [stage]}
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    needs = needs_of(str(tmp_path / "run.yaml"))
    found = [(need.ok, need.found, need.prevents) for need in needs if need.part.endswith("flash-linear-attention")]
    assert found == row
