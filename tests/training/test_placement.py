"""Trainer and servers in turns: what leaves memory, that it comes back as it was, and what the ledger says."""

import asyncio
import filecmp
import json
import shutil
from pathlib import Path

import pytest
from helpers.runs import finish, run_config, start_ranks, write_problems
from transformers import AutoTokenizer

from exprl_megatron.algorithms.batch import TrainSample
from exprl_megatron.config.load import check_config
from exprl_megatron.config.placement import PlacementConfig
from exprl_megatron.config.policy import Layout, OptimizerConfig, PolicyConfig
from exprl_megatron.errors import RunStopped, UserError
from exprl_megatron.judging.judge import Judge
from exprl_megatron.launch.preflight import check_inputs
from exprl_megatron.problems.sources import load_problems
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.runs.journal import Journal
from exprl_megatron.training.phase_switch import PhaseSwitch
from exprl_megatron.weight_sync.coordinator import RankCoordinator

COLOCATED = {"placement": {"kind": "colocated"}, "sync": {"transport": "handles", "max_log_prob_gap": 1e-4}}


def sparse(problems: Path, **changes) -> dict:
    stage = {
        "kind": "sparse-rl",
        "name": "sparse",
        "steps": 2,
        "problems": {"source": str(problems)},
        "problems_per_step": 2,
        "group_size": 3,
        "sampling": {"temperature": 1.0, "max_new_tokens": 24},
        "loss": {"entropy_coefficient": 0.5},
        "optimizer": {"lr": 1e-3},
    }
    return stage | changes


@pytest.mark.parametrize(
    ("stage", "sync", "message"),
    [
        ({}, "broadcast", "sync.transport is broadcast, which has no group of two processes on one GPU"),
        (
            {"max_staleness": 1, "loss": {"correction": {"kind": "masked"}}},
            "handles",
            "stage sparse samples while it learns",
        ),
        ({"optimizer": {"offload": 0.5}}, "handles", r"stage sparse has optimizer.offload 0.5; set it to 0"),
    ],
)
def test_what_cannot_take_turns_is_refused(tmp_path, stage, sync, message):
    problems = tmp_path / "problems.jsonl"
    changes = COLOCATED | {"sync": {"transport": sync}, "stages": [sparse(problems, **stage)]}
    with pytest.raises(UserError, match=message):
        run_config(tmp_path / "run", tmp_path, tmp_path, problems, **changes)


def test_parts_leave_the_device_and_come_back_bit_for_bit(tiny_model):
    from exprl_megatron.algorithms.objective import supervised_objective
    from exprl_megatron.policy.offload import Offload
    from exprl_megatron.policy.policy import Policy
    from exprl_megatron.policy.world import enter_world, leave_world

    sequences = [TrainSample(tuple(range(3, 9 + i)), tuple(range(90, 60 - 5 * i, -1))) for i in range(4)]
    tokens = sum(len(sequence.response_ids) for sequence in sequences)

    def learned(switching: bool) -> list[list[float]]:
        policy = Policy(PolicyConfig(model=str(tiny_model("qwen3"))), seed=0)
        offload = Offload(policy)
        policy.begin_stage(OptimizerConfig(lr=1e-2), total_steps=10)
        for _ in range(3):
            if switching:
                here = offload.bytes_on_device()
                offload.offload("gradients", "optimizer", "weights")
                assert offload.bytes_on_device() == {"weights": 0, "gradients": 0, "optimizer": 0}
                offload.onload("weights", "gradients", "optimizer")
                assert offload.bytes_on_device() == here and here["weights"] > 0 and here["gradients"] > 0
            policy.accumulate(sequences, supervised_objective(), 1.0, denominator=tokens)
            policy.apply_update()
        return [row.tolist() for row in policy.log_probs(sequences, 1.0)]

    enter_world(Layout())
    try:
        assert learned(switching=True) == learned(switching=False)
    finally:
        leave_world()


class Idle:
    """Servers and weights that do nothing."""

    async def wake(self, tag: str) -> None:
        return None

    def push_weights(self, version: str) -> dict:
        return {}


def test_a_side_that_leaves_more_on_the_device_than_it_may_stops_the_run(tiny_model, monkeypatch):
    from exprl_megatron.policy.offload import Offload
    from exprl_megatron.policy.policy import Policy
    from exprl_megatron.policy.world import enter_world, leave_world

    def phases(bound_gb: float) -> PhaseSwitch:
        policy = Policy(PolicyConfig(model=str(tiny_model("qwen3"))), seed=0)
        policy.begin_stage(OptimizerConfig(), total_steps=1)
        return PhaseSwitch(
            PlacementConfig(kind="colocated", max_asleep_gb=bound_gb), policy, coordinator, Idle(), Idle()
        )

    enter_world(Layout())
    coordinator = RankCoordinator(60.0)
    try:
        phases(1e-6).sync_weights("v1")
        offload = Offload.offload
        monkeypatch.setattr(
            Offload, "offload", lambda self, *parts: offload(self, *(p for p in parts if p != "optimizer"))
        )
        phases(1.0).sync_weights("v1")
        with pytest.raises(RunStopped, match=r"the trainer left .* GiB .* than placement.max_asleep_gb \(1e-06\)"):
            phases(1e-6).sync_weights("v1")
    finally:
        coordinator.close()
        leave_world()


@pytest.mark.parametrize(
    ("judge", "changes", "message"),
    [
        ({"endpoints": ["http://host/v1"]}, {}, "judge.endpoints are given; drop one of them"),
        ({"gate": {"traces": "t.jsonl"}}, {}, "judge.gate needs the judge before a step is sampled"),
        ({}, {"sync": {"fp8": True}}, "the judge's weights are not in FP8"),
    ],
)
def test_what_the_policys_servers_cannot_judge_is_refused(tmp_path, judge, changes, message):
    with pytest.raises(UserError, match=message):
        lent_config(tmp_path, tmp_path, tmp_path, judge, **changes)


def test_a_judge_of_another_kind_than_the_policy_cannot_use_its_servers(tiny_model, tmp_path):
    config = lent_config(tmp_path, tiny_model("qwen3"), tiny_model("qwen3", seed=1, tied=True), {})
    with pytest.raises(UserError, match=r"judge.model \(.*\) has another architecture than policy.model"):
        check_inputs(config)


@pytest.mark.slow
def test_the_policys_servers_judge_under_the_judges_weights_and_sample_under_the_policys(
    trained_server, tiny_model, tmp_path
):
    config = lent_config(tmp_path, tiny_model("qwen3"), tiny_model("qwen3", seed=1), {})
    check_inputs(config)
    finish(start_ranks(config, {"policy": trained_server}))
    paths = RunDirectory(config.directory)
    metrics = [json.loads(line)["metrics"] for line in paths.metrics.read_text().splitlines()]
    assert len(metrics) == 5, "each step compared the log-probs of trainer and sampler"
    journal = Journal(paths.journal)
    groups = [group for step in (1, 2, 3) for group in journal.read("prime", step).groups]
    problems = {problem.id: problem for problem in load_problems(config.stages[0].problems)}

    async def judged_directly():
        async with trained_server.client() as client:
            await client.update_from_disk(config.judge.model, "judge")
            judge = Judge(config.judge, [client], AutoTokenizer.from_pretrained(config.judge.model))
            return [await judge.grade(problems[g.problem_id], m.trace.text) for g in groups for m in g.samples]

    expected = asyncio.run(judged_directly())
    assert len({judgement.value for judgement in expected}) > 1
    assert [member.judgement.value for group in groups for member in group.samples] == [j.value for j in expected]


def lent_config(root: Path, model: Path, judge: Path, settings: dict, **changes):
    problems = write_problems(root / "problems.jsonl")
    tree = run_config(root / "run", model, judge, problems, **changes).model_dump(mode="json", exclude_unset=True)
    tree["judge"] |= {"placement": "policy"} | settings
    return check_config(tree, "test")


@pytest.mark.slow
def test_a_colocated_run_learns_what_one_with_separate_servers_does_and_reports_its_memory(
    trained_server, tiny_model, tmp_path
):
    model, problems = tiny_model("qwen3"), write_problems(tmp_path / "problems.jsonl")
    stages = {"stages": [sparse(problems)]}
    config = run_config(tmp_path / "turns", model, model, problems, **COLOCATED, **stages)
    paths = RunDirectory(config.directory)
    finish(start_ranks(config, {"policy": trained_server}))

    apart = run_config(tmp_path / "apart", model, model, problems, **stages)
    separate = RunDirectory(apart.directory)
    separate.claim(apart, resume=False).release()
    shutil.copytree(paths.journal, separate.journal, dirs_exist_ok=True)
    finish(start_ranks(apart, {"policy": trained_server}, resume=True))
    name = "sparse/model.safetensors"
    assert filecmp.cmp(paths.models / name, separate.models / name, shallow=False)

    for record in map(json.loads, paths.metrics.read_text().splitlines()):
        ledger = {key: value for key, value in record["metrics"].items() if key.startswith("memory/")}
        assert all(ledger[f"memory/sampling/{part}"] == 0 for part in ("weights", "gradients", "optimizer", "asleep"))
        assert all(ledger[f"memory/learning/{part}"] == 0 for part in ("weights", "gradients", "optimizer"))
        assert ledger["memory/servers_slept"] == 0, "a server on a CPU cannot"
