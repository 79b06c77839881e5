"""Whole runs on real servers: what is learned, what is kept, and what a kill -9 costs."""

import filecmp
import itertools
import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from helpers.forking import starter
from helpers.processes import wait_until
from helpers.runs import finish, held_out, kill_when, run_config, start_ranks, write_problems
from metric_names import undocumented
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.errors import Preempted
from exprl_megatron.problems.order import problem_indices
from exprl_megatron.reporting.metrics import read_metrics
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.runs.journal import Journal
from exprl_megatron.serving.server_process import start_servers
from exprl_megatron.serving.server_spec import server_specs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tiny_model, tmp_path_factory):
    """Model, judge and problems, as run_config takes them."""
    problems = write_problems(tmp_path_factory.mktemp("problems") / "problems.jsonl")
    return {"model": tiny_model("qwen3"), "judge": tiny_model("qwen3", seed=1, tied=True), "problems": problems}


@pytest.fixture(scope="module")
def servers(inputs, tmp_path_factory):
    """A policy and a judge server, side by side."""
    logs = tmp_path_factory.mktemp("logs")
    config = ServerConfig(request_deadline_s=120, max_total_tokens=16384)
    specs = server_specs("policy", inputs["model"], config, logs) + server_specs("judge", inputs["judge"], config, logs)
    started = start_servers(specs, starter())
    yield {"policy": started[0], "judge": started[1]}
    for server in started:
        server.stop()


def steps_of(config):
    """The records of the run's steps."""
    return [record for record in read_metrics(RunDirectory(config.directory).metrics) if record["step"]]


@pytest.fixture(scope="module")
def killed_run(inputs, servers, tmp_path_factory):
    """A run that was killed in mid-sampling, between sampling and learning, and while writing a checkpoint.

    Between the first two it was asked to stop, while it learned.
    """
    config = run_config(tmp_path_factory.mktemp("killed") / "run", **inputs, evaluation=held_out(inputs["problems"], 2))
    paths = RunDirectory(config.directory)
    journal = Journal(paths.journal)
    ranks = start_ranks(config, servers)
    kill_when(ranks, lambda: any(record["step"] == 1 for record in read_metrics(paths.metrics)))
    ranks = start_ranks(config, servers, resume=True)
    wait_until(lambda: journal.path("prime", 2).is_file() or not ranks.running(), 300)
    paths.stop_request.touch()
    with pytest.raises(Preempted, match=r"after step \d of \w+, with a checkpoint; continue with --resume"):
        finish(ranks)
    ranks = start_ranks(config, servers, resume=True)
    kill_when(ranks, journal.path("prime", 3).is_file)
    sampled = journal.path("prime", 3).read_bytes()
    ranks = start_ranks(config, servers, resume=True)
    kill_when(ranks, lambda: journal.path("sparse", 1).is_file() and any(paths.checkpoints.glob("*.tmp")))
    finish(start_ranks(config, servers, resume=True))
    assert journal.path("prime", 3).read_bytes() == sampled, "a journalled step was sampled again"
    return config


def test_killed_three_times_the_run_leaves_the_weights_of_an_uninterrupted_one(killed_run, inputs, servers, tmp_path):
    config = run_config(tmp_path / "run", **inputs, evaluation=held_out(inputs["problems"], 2))
    paths, killed = RunDirectory(config.directory), RunDirectory(killed_run.directory)
    config_claim = paths.claim(config, resume=False)
    config_claim.release()
    shutil.copytree(killed.journal, paths.journal, dirs_exist_ok=True)
    finish(start_ranks(config, servers, resume=True))
    for stage in ("prime", "sparse"):
        name = f"{stage}/model.safetensors"
        assert filecmp.cmp(paths.models / name, killed.models / name, shallow=False), f"{stage} differs"


def test_every_step_is_logged_once_although_the_run_was_killed(killed_run):
    records = steps_of(killed_run)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert [record["stage"] for record in records] == ["prime"] * 3 + ["sparse"] * 2
    lines = [json.loads(line) for line in RunDirectory(killed_run.directory).metrics.read_text().splitlines()]
    assert sorted(line["step"] for line in lines if "loss" in line["metrics"]) == [1, 2, 3, 4, 5]


def test_held_out_problems_are_evaluated_every_two_steps_once_under_the_weights_of_that_step(killed_run):
    paths = RunDirectory(killed_run.directory)
    found = {
        str(path.relative_to(paths.evaluations)): json.loads(path.read_text())["weight_version"]
        for path in paths.evaluations.rglob("*.json")
    }
    # Stage sparse takes two optimizer steps a step.
    expected = {"start.json": "v0", "prime/step-2.json": "v2", "prime.json": "v3", "sparse.json": "v7"}
    assert found == expected
    evaluated = [r["step"] for r in read_metrics(paths.metrics) if "evaluation/pass@1" in r["metrics"]]
    assert evaluated == [0, 2, 3, 5]


def test_trainer_and_sampler_agree_on_every_step_of_the_run(killed_run):
    gaps = [record["metrics"]["sampler_gap/mean"] for record in steps_of(killed_run)]
    assert len(gaps) == 5
    assert 0 < max(gaps) <= 1e-4


def test_traces_carry_the_version_of_the_weights_that_sampled_them(killed_run):
    journal = Journal(RunDirectory(killed_run.directory).journal)
    for stage, step, version in (("prime", 1, "v0"), ("prime", 3, "v2"), ("sparse", 1, "v3")):
        versions = {
            span[0]
            for group in journal.read(stage, step).groups
            for member in group.samples
            for span in member.trace.weight_versions
        }
        assert versions == {version}


def test_the_models_of_both_stages_load_in_transformers_and_have_learned(killed_run, inputs):
    models = RunDirectory(killed_run.directory).models
    start = load_file(Path(inputs["model"]) / "model.safetensors")
    for stage in ("prime", "sparse"):
        loaded = AutoModelForCausalLM.from_pretrained(models / stage)
        learned = load_file(models / stage / "model.safetensors")
        assert loaded.config.model_type == "qwen3"
        assert learned.keys() == start.keys()
        assert any(not learned[name].equal(start[name]) for name in start)


@pytest.fixture(scope="module")
def mixed_run(inputs, servers, tmp_path_factory):
    """One or two steps of every other kind of stage, at TP2."""
    segments = {"splitter": "delimiter", "delimiter": "e", "min_tokens": 0}  # an untrained model writes no headings
    stages = [
        {
            "kind": "exprl-process",
            "name": "process",
            "steps": 2,
            "segments": segments,
            "over_sampling": 1.5,
        },
        {"kind": "self-distill", "name": "distill", "steps": 1, "teacher_prompt": {"user": "{problem} {reference}"}},
        {"kind": "sparse-rl", "name": "dapo", "steps": 1, "dynamic_sampling": 1, "overlong": "exclude"},
    ]
    whole = run_config(tmp_path_factory.mktemp("mixed") / "run", **inputs)
    shared = whole.stages[0].model_dump(
        mode="json", include={"problems", "problems_per_step", "group_size", "sampling"}
    )
    sft = {"kind": "sft", "name": "sft", "steps": 1, "batch_size": 4, "problems": shared["problems"]}
    config = run_config(Path(whole.directory), **inputs, stages=[stage | shared for stage in stages] + [sft])
    finish(start_ranks(config, servers))
    return config


def test_every_segment_of_a_process_stage_is_judged(mixed_run):
    sampled = Journal(RunDirectory(mixed_run.directory).journal).read("process", 1)
    members = [member for group in sampled.groups for member in group.samples]
    assert max(len(member.segments) for member in members) > 1
    for member in members:
        bounds = [0, *(segment.end for segment in member.segments)]
        assert bounds == [*(segment.start for segment in member.segments), len(member.trace.token_ids)]


def test_every_kind_of_stage_learns_and_logs_what_it_did(mixed_run):
    paths = RunDirectory(mixed_run.directory)
    records = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    assert [record["stage"] for record in records] == ["process", "process", "distill", "dapo", "sft"]
    logged = {"segments/mean", "kl/ref", "clip_share", "entropy", "padding/padded", "padding/packed"}
    assert logged <= records[0]["metrics"].keys()
    assert not undocumented(name for record in records for name in record["metrics"]), "docs/metrics.md lacks them"
    weights = [load_file(paths.models / name / "model.safetensors") for name in ("process", "distill", "sft")]
    for before, after in itertools.pairwise(weights):
        assert any(not before[name].equal(after[name]) for name in before)


def test_dynamic_sampling_draws_further_problems_in_place_of_equal_groups(mixed_run):
    sampled = Journal(RunDirectory(mixed_run.directory).journal).read("dapo", 1)
    assert len(sampled.groups) == 2
    # An untrained model solves nothing, so that both groups are replaced once.
    assert sampled.prompts_consumed == 4


def test_over_sampling_draws_more_problems_and_takes_as_many_groups_as_ever(mixed_run):
    journal = Journal(RunDirectory(mixed_run.directory).journal)
    for step in (1, 2):
        sampled = journal.read("process", step)
        drawn = problem_indices(mixed_run.seed, "process", 3 * (step - 1), 3, 12)
        assert sampled.prompts_consumed == 3 and len(sampled.groups) == 2
        assert {group.problem_id for group in sampled.groups} < {f"p{i}" for i in drawn}


def test_judgements_are_kept_by_content(mixed_run):
    with sqlite3.connect(RunDirectory(mixed_run.directory).judgements) as store:
        (count,) = store.execute("select count(*) from judgements").fetchone()
    assert count > 0
