"""Learning from a rollout log made here, without a server: ranks get their own sequences and learn the same."""

import json
import random

import pytest
import torch
from helpers.runs import finish, run_config, start_ranks, write_problems
from safetensors.torch import load_file

from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.rollout.group import GradedTrace, Group
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.runs.journal import Journal, SampledStep

pytestmark = pytest.mark.slow


def sampled(step: int) -> SampledStep:
    """Two groups of three, of unlike lengths; an abstention."""
    draw = random.Random(step)
    groups = []
    for name in ("p0", "p1"):
        members = []
        for sample in range(3):
            ids = [draw.randrange(8, 100) for _ in range(draw.randrange(3, 24))]
            log_probs = [-draw.random() for _ in ids]
            trace = Trace(name, sample, (5, 6, 7), ids, log_probs, "t", "stop", ((f"v{step - 1}", 0, len(ids)),))
            judgement = Abstained("unreadable") if (name, sample) == ("p1", 2) else Scored(sample / 2)
            members.append(GradedTrace(trace, judgement, verified=Scored(1.0)))
        groups.append(Group(name, tuple(members)))
    return SampledStep(groups, 2, {"asked": 6})


@pytest.fixture(scope="module")
def learned(tiny_model, tmp_path_factory):
    """Metrics of every step and the last weights, for one rank, and for two that share the data."""
    root = tmp_path_factory.mktemp("learning")
    problems, model = write_problems(root / "problems.jsonl"), tiny_model("qwen3")
    kept = Journal(RunDirectory(root / "kept").journal)
    for stage, steps in (("prime", 3), ("sparse", 2)):
        for step in range(1, steps + 1):
            kept.write(stage, step, sampled(step))
    found = {}
    for dp in (1, 2):
        config = run_config(
            root / f"dp{dp}",
            model,
            model,
            problems,
            policy={"model": str(model), "layout": {"dp": dp}, "max_tokens": 160},
            debug={"only": "learning", "rollouts": str(root / "kept")},
            sync={"max_log_prob_gap": None},
            journal={"keep_steps": 2},
        )
        finish(start_ranks(config, {}))
        paths = RunDirectory(config.directory)
        records = [json.loads(line)["metrics"] for line in paths.metrics.read_text().splitlines()]
        found[dp] = records, load_file(paths.models / "sparse" / "model.safetensors")
    assert kept.steps("prime") == [1, 2, 3], "another run's rollout log was shortened"
    return found


def test_ranks_that_share_the_data_learn_what_one_rank_learns(learned):
    (alone, weights), (shared, others) = learned[1], learned[2]
    assert len(alone) == len(shared) == 5
    for one, two in zip(alone, shared, strict=True):
        for name in ("loss", "grad_norm", "tokens", "reward/mean", "reward/abstained"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
        assert two.get("judge/asked") == one.get("judge/asked")
    assert [record["judge/asked"] > 0 for record in alone if "judge/asked" in record] == [True] * 3, (
        "of stage prime alone"
    )
    for name, weight in weights.items():
        assert torch.allclose(others[name], weight, atol=1e-4), name


def test_traces_that_are_out_of_the_loss_count_in_the_statistics(learned):
    for record in learned[2][0]:
        assert record["reward/abstained"] == pytest.approx(1 / 6)
