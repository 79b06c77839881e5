"""Runs on real servers with the code of examples/: custom_rewards.yaml, and the stages of stages.py."""

import json
import math
from collections import Counter

import pytest
from helpers.runs import finish, kill_when, start_ranks, write_problems

from exprl_megatron.config.load import check_config, load_config
from exprl_megatron.errors import UserError
from exprl_megatron.launch.preflight import check_inputs
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.runs.journal import Journal

CONFIG = "examples/custom_rewards.yaml"


def overridden(directory, model, problems) -> list[str]:
    """The example with tiny models, on problems of which half have a domain of their own."""
    return [
        f"directory={directory}",
        f"policy.model={model}",
        "policy.layout.dp=1",
        "server.count=1",
        f"judge.model={model}",
        "judge.score_format=constrained",
        "judge.max_new_tokens=12",
        "judge.gate=null",
        "verifier.domains.measured=examples.verifiers:Counter",
        "evaluation=null",
        "sync.max_log_prob_gap=1e-4",
        f"stages.0.problems={{source: {problems}, domains: [measured]}}",
        "stages.0.steps=2",
        "stages.0.problems_per_step=4",
        "stages.0.group_size=3",
        "stages.0.sampling.max_new_tokens=24",
        "stages.0.overlong=score",
    ]


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    domains = ("math", "measured")
    records = [
        {"id": f"p{i}", "problem": f"What is {i} plus 1?", "reference": f"It is {i + 1}.", "answer": f"{i + 1}"}
        | {"domain": domains[i % 2]}
        for i in range(8)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_example_as_it_is_passes_the_checks_of_a_start():
    check_inputs(load_config(CONFIG))


@pytest.mark.slow
def test_a_run_learns_from_rewards_of_the_users_own(trained_server, tiny_model, problems, tmp_path):
    model = tiny_model("qwen3")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "metrics_from_elsewhere.py").write_text("def traced(step, groups): return {'step': step.step}\n")
    metrics = "[examples.step_metrics:trusted_but_wrong, metrics_from_elsewhere:traced]"
    mine = [f"plugin_path=[{elsewhere}]", f"step_metrics={metrics}"]
    config = load_config(CONFIG, [*overridden(tmp_path / "run", model, problems), *mine])
    finish(start_ranks(config, {"policy": trained_server, "judge": trained_server}))
    paths = RunDirectory(config.directory)
    metrics = [json.loads(line)["metrics"] for line in paths.metrics.read_text().splitlines()]
    assert len(metrics) == 2
    evidence = set()
    for step in (1, 2):
        groups = Journal(paths.journal).read("prime", step).groups
        samples = [sample for group in groups for sample in group.samples]
        rewards = []
        for sample in samples:
            values = {term.name: term.value for term in sample.terms}
            assert list(values) == ["judge", "verifier", "repeated_lines", "length"]
            assert values["judge"] == sample.score and values["verifier"] == sample.verified.value
            assert values["length"] == len(sample.trace.token_ids) / 24
            weights = (1.0, 0.5, -0.2, -0.1)
            rewards.append(sum(w * v for w, v in zip(weights, values.values(), strict=True)))
            evidence.add(sample.verified.evidence.split()[-1])
        assert [sample.reward for sample in samples] == pytest.approx(rewards)
        found = metrics[step - 1]
        assert found["reward/mean"] == pytest.approx(sum(rewards) / len(rewards))
        assert found["reward/term/length"] > 0
        assert found["custom/longest_trace"] == max(len(sample.trace.token_ids) for sample in samples)
        assert found["custom/step"] == step
        assert 0 <= found["custom/trusted_but_wrong"] <= 1
        assert math.isfinite(found["grad_norm"]) and found["grad_norm"] > 0
    # Both verifiers were asked: one counts words, the other compares numbers.
    assert "words" in evidence and len(evidence) > 1


LOSS_OF_RANK_3 = """
import os
from pathlib import Path

def loss(batch):
    if os.environ["RANK"] == "3" and not Path(__file__).with_name("repaired").exists():
        raise KeyError("lost")
    return -batch.advantages * (batch.log_probs - batch.log_probs.detach()).exp()
"""


@pytest.mark.slow
def test_a_run_of_four_ranks_that_was_killed_or_whose_loss_fails_on_one_of_them_has_counted_every_step(
    trained_server, tiny_model, tmp_path
):
    """Later stages learn from what was kept."""
    (tmp_path / "loss_of_rank_3.py").write_text(LOSS_OF_RANK_3)
    shared = {
        "problems": str(write_problems(tmp_path / "problems.jsonl")),
        "steps": 2,
        "problems_per_step": 3,
        "group_size": 2,
        "sampling": {"max_new_tokens": 8},
    }
    config = check_config(
        {
            "directory": str(tmp_path / "run"),
            "plugin_path": [str(tmp_path)],
            "policy": {"model": str(tiny_model("qwen3")), "max_tokens": 160, "layout": {"tp": 2, "dp": 2}},
            "checkpoint": {"every_steps": 1},
            "sync": {"max_log_prob_gap": 1e-4},
            "stages": [
                {"kind": "examples.stages:KeepSolvable"} | shared,
                {
                    "kind": "examples.stages:SecondAttempt",
                    "problems_from": "keep-solvable",
                    "loss": {"surrogate": "loss_of_rank_3:loss", "dual_clip": None},
                }
                | shared
                | {"steps": 1},
            ],
        },
        "test",
    )
    paths = RunDirectory(config.directory)
    ranks = start_ranks(config, {"policy": trained_server})
    kill_when(ranks, lambda: Journal(paths.journal).has("keep-solvable", 2))
    assert not paths.kept_problems.exists()
    ranks = start_ranks(config, {"policy": trained_server}, resume=True)
    with pytest.raises(UserError) as failed:
        finish(ranks)
    ranks.stop()
    place = f"{tmp_path / 'loss_of_rank_3.py'}, line 7, in loss"
    assert str(failed.value) == f"loss.surrogate: loss_of_rank_3:loss failed at {place}: KeyError: 'lost'."
    before = Journal(paths.journal).read("second-attempt", 1)
    (tmp_path / "repaired").touch()
    finish(start_ranks(config, {"policy": trained_server}, resume=True))
    sampled = [Journal(paths.journal).read("keep-solvable", step).groups for step in (1, 2)]
    kept = json.loads((paths.kept_problems / "keep-solvable.json").read_bytes())["problems"]
    # Every pass rate is within the bounds: what both steps sampled is kept.
    assert set(kept) == {group.problem_id for groups in sampled for group in groups} and len(kept) == 6
    last = Journal(paths.journal).read("second-attempt", 1)
    texts = [[[sample.trace.text for sample in group.samples] for group in step.groups] for step in (before, last)]
    assert texts[0] == texts[1]
    assert last.prompts_consumed == 3 and {group.problem_id for group in last.groups} <= set(kept)
    assert Counter(len(group.samples) for group in last.groups) == {2: 3}
    metrics = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    assert [line["metrics"].get("custom/tried") for line in metrics] == [3.0, 6.0, None]
    assert [line["metrics"].get("loss") is None for line in metrics] == [True, True, False]
