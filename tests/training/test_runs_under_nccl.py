"""Whole runs whose groups behave as NCCL's do: nothing hangs, and no object of ours is sent over them."""

import json

import pytest
from helpers.runs import finish, run_config, start_ranks, write_problems
from helpers.under_nccl import connected, faults, uses_backend

from exprl_megatron.runs.directory import RunDirectory

pytestmark = pytest.mark.slow

SEPARATE = {"sync": {"transport": "broadcast", "max_log_prob_gap": 1e-4}}
COLOCATED = {"placement": {"kind": "colocated"}, "sync": {"transport": "handles", "max_log_prob_gap": 1e-4}}


@pytest.fixture
def ran(request, trained_server, tiny_model, tmp_path, monkeypatch):
    """The directories of a run of two stages and of what its processes recorded; the policy's server judges too."""
    layout, changes = request.param
    records = tmp_path / "records"
    records.mkdir()
    for name, value in uses_backend(records).items():
        monkeypatch.setenv(name, value)
    problems = write_problems(tmp_path / "problems.jsonl")
    model, judge = tiny_model("qwen3"), tiny_model("qwen3", seed=1)
    whole = run_config(tmp_path / "run", model, judge, problems, **changes)
    policy = whole.policy.model_copy(update={"layout": whole.policy.layout.model_copy(update={"tp": 1} | layout)})
    prime, sparse = (stage.model_copy(update={"steps": 1}) for stage in whole.stages)
    shared = whole.judge.model_copy(update={"placement": "policy"})
    finish(
        start_ranks(
            whole.model_copy(update={"policy": policy, "stages": (prime, sparse), "judge": shared}),
            {"policy": trained_server},
        )
    )
    return RunDirectory(whole.directory), records


@pytest.mark.parametrize(
    "ran",
    [({"pp": 2}, SEPARATE), ({"tp": 2}, COLOCATED)],
    ids=["pp 2, separate, broadcast", "tp 2, colocated, handles"],
    indirect=True,
)
def test_a_run_of_two_stages_comes_to_its_end(ran, nccl_records):
    paths, records = ran
    metrics = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    assert [line["stage"] for line in metrics] == ["prime", "sparse"]
    assert faults(records) == faults(nccl_records) == []
    assert connected(records), "the run's groups went over another backend"
