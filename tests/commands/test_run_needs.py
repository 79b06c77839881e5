"""`exprl doctor RUN` names each model and each problem file that the run needs, once."""

import json

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
