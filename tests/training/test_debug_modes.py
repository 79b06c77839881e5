"""Rollouts alone, learning alone from what was kept, and a run that checks itself."""

import asyncio
import json
import re
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.runs import finish, run_config, start_ranks, write_problems
from safetensors.torch import load_file

from exprl_megatron.config.load import check_config
from exprl_megatron.errors import RunStopped, UserError
from exprl_megatron.judging.judgement import Scored
from exprl_megatron.launch.preflight import check_inputs
from exprl_megatron.models.routing import Routing
from exprl_megatron.rollout.group import GradedTrace, Group
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.runs.journal import Journal, SampledStep
from exprl_megatron.training.first_update import check_first_update
from exprl_megatron.training.rollouts import Rollouts


def _config(directory, model, problems, judge=None, **changes):
    """The runs of tests, judged by the policy's own untrained model."""
    return run_config(directory, model, judge or model, problems, **changes)


def _metrics(config):
    lines = RunDirectory(config.directory).metrics.read_text().splitlines()
    return [json.loads(line)["metrics"] for line in lines]


def _weights(config, stage):
    return load_file(RunDirectory(config.directory).models / stage / "model.safetensors")


def test_ratios_and_the_kl_to_a_stage_s_start_must_be_exact_at_first():
    check_first_update("prime", 1, {"kl/old": 0.0, "kl/ref": 0.0})
    check_first_update("prime", 2, {"kl/old": 0.0, "kl/ref": 0.3})
    # The reference policy's routers choose for themselves: the servers' choice may differ where two experts are equal.
    check_first_update("prime", 1, {"kl/old": 0.0, "kl/ref": 1e-12}, replays_routing=True)
    with pytest.raises(RunStopped, match="kl/old"):
        check_first_update("prime", 1, {"kl/old": 1e-12}, replays_routing=True)
    with pytest.raises(RunStopped, match=r"step 1 of prime.* kl/ref is 1\.000e-12 .*reference policy"):
        check_first_update("prime", 1, {"kl/old": 0.0, "kl/ref": 1e-12})
    with pytest.raises(RunStopped, match=r"step 7 of sparse.* kl/old is 1\.000e-12 .*before the step"):
        check_first_update("sparse", 7, {"kl/old": 1e-12})


def test_what_keeps_a_run_from_checking_itself_is_refused(tiny_model, tmp_path):
    problems = write_problems(tmp_path / "problems.jsonl")
    with pytest.raises(UserError) as refused:
        _config(
            tmp_path,
            tiny_model("qwen3"),
            problems,
            debug={"assertions": True},
            sync={"verify": False, "max_log_prob_gap": None},
        )
    assert "sync.verify is false" in str(refused.value)
    assert "max_log_prob_gap (null) gives no bound" in str(refused.value)


def test_a_log_without_experts_is_not_learned_from_where_they_are_to_be_replayed(tiny_model, tmp_path):
    problems, model = write_problems(tmp_path / "problems.jsonl"), tiny_model("mixtral")
    journal = Journal(tmp_path / "journal")
    trace = Trace("p1", 0, (1, 2), (3,), (-0.5,), "x", "stop", (("v0", 0, 1),))
    for step, experts in ((1, None), (2, np.zeros((2, 2, 2), np.uint8))):
        graded = GradedTrace(replace(trace, routed_experts=experts), Scored(1.0))
        journal.write("prime", step, SampledStep([Group("p1", (graded,))], 1))
    read = {}
    for replays in (True, False):
        policy = {"model": str(model), "max_tokens": 160, "router_replay": replays}
        config = _config(tmp_path / "run", model, problems, policy=policy)
        rollouts = Rollouts(config, journal, None, [], None, None)
        read[replays] = lambda step, r=rollouts, stage=config.stages[0]: r.read_logged(stage, step)
    with pytest.raises(UserError, match=r"step-000001\.parquet has no routed experts: it was sampled without"):
        read[True](1)
    (group,) = read[True](2).groups
    assert group.samples[0].trace.routed_experts.shape == (2, 2, 2)
    assert read[False](1).groups and read[True](3) is None
    # Of a model with another number of layers, of experts for a token, of experts: each alone.
    others = [np.zeros((2, 3, 2), np.uint8), np.zeros((2, 2, 1), np.uint8), np.full((2, 2, 2), 4, np.uint8)]
    for step, experts in enumerate(others, 4):
        graded = GradedTrace(replace(trace, routed_experts=experts), Scored(1.0))
        journal.write("prime", step, SampledStep([Group("p1", (graded,))], 1))
        with pytest.raises(
            UserError, match=r"has the routed experts of another model: .* has 2 of 4 in each of 2; set"
        ):
            read[True](step)
        assert read[False](step).groups


@pytest.mark.parametrize("shared", [True, False])
def test_held_out_problems_that_are_for_training_too_are_counted_in_the_log(tiny_model, tmp_path, shared):
    trained = write_problems(tmp_path / "problems.jsonl")
    held_out = tmp_path / "held_out.jsonl"
    other = {"id": "other", "problem": "What is 17 + 17?", "answer": "34"}
    lines = trained.read_text().splitlines()[:2] if shared else []
    held_out.write_text("\n".join([*lines, json.dumps(other)]) + "\n")
    evaluation = {"problems": {"source": str(held_out)}, "sampling": {"max_new_tokens": 16}}
    config = _config(tmp_path, tiny_model("qwen3"), trained, evaluation=evaluation)
    said: list[str] = []
    Rollouts(config, None, None, [], None, SimpleNamespace(log=said.append)).problems.prepare()
    expected = f"2 of 3 problems of the evaluation are also in {trained}, which is for training"
    assert [line.startswith(expected) for line in said] == ([True] if shared else [])


@pytest.mark.parametrize("replays", [True, False, None])
def test_servers_are_asked_for_their_experts_where_these_are_replayed(tiny_model, tmp_path, monkeypatch, replays):
    model = tiny_model("mixtral")
    policy = {"model": str(model), "max_tokens": 160, "router_replay": replays}
    config = _config(tmp_path, model, write_problems(tmp_path / "problems.jsonl"), policy=policy)
    bar = SimpleNamespace(sampled=lambda: None, graded=lambda: None)
    logger = SimpleNamespace(say=print, rollouts=lambda *shown: nullcontext(bar))

    async def grade(problem, trace):
        return GradedTrace(trace, Scored(1.0))

    judging = SimpleNamespace(grade=lambda stage, tokenizer: grade, take_counts=dict)
    servers = SimpleNamespace()
    rollouts, asked = Rollouts(config, None, servers, [], judging, logger), []
    rollouts.problems.prepare()

    async def sample(pool, prompts, group_size, *further, on_trace, routing, **named):
        asked.append((pool, routing))
        traces = [Trace(p.problem_id, 0, p.token_ids, (5,), (-0.5,), "4", "stop", ()) for p in prompts]
        for trace in traces:
            await on_trace(trace)
        return [[trace] for trace in traces]

    monkeypatch.setattr("exprl_megatron.training.graded_sampling.sample_groups", sample)
    asyncio.run(rollouts._steps.sample_step(config.stages[1], 1, 0, ["v0"]))
    assert asked == [(servers, Routing(layers=2, top_k=2, experts=4) if replays else None)]


def test_learning_alone_needs_every_step_that_it_learns_from(tiny_model, tmp_path):
    problems, model = write_problems(tmp_path / "problems.jsonl"), tiny_model("qwen3")
    with pytest.raises(UserError, match=r"debug\.only is learning and debug\.rollouts is null"):
        _config(tmp_path / "run", model, problems, debug={"only": "learning"})
    other = tmp_path / "other"
    config = _config(tmp_path / "run", model, problems, debug={"only": "learning", "rollouts": str(other)})
    with pytest.raises(
        UserError, match=r"other, whose rollout log does not have step 1 of stage prime; it has 0 of 3 steps"
    ):
        check_inputs(config)


@pytest.mark.slow
def test_rollouts_alone_are_learned_from_later_without_any_server(trained_server, tiny_model, tmp_path):
    problems, model = write_problems(tmp_path / "problems.jsonl"), tiny_model("qwen3")
    servers = {"policy": trained_server, "judge": trained_server}
    sampling = _config(tmp_path / "sampled", model, problems, debug={"only": "sampling"})
    finish(start_ranks(sampling, servers))
    journal = Journal(RunDirectory(sampling.directory).journal)
    assert journal.steps("prime") == [1, 2, 3] and journal.steps("sparse") == [1, 2]
    groups = [group for step in (1, 2, 3) for group in journal.read("prime", step).groups]
    versions = {version for g in groups for m in g.samples for version, _, _ in m.trace.weight_versions}
    assert versions == {"v0"}
    start = load_file(model / "model.safetensors")
    paths = RunDirectory(sampling.directory)
    assert not any(path.is_file() for kept in (paths.models, paths.checkpoints) for path in kept.rglob("*")), "copies"

    learned = []
    for name in ("learned", "again"):
        debug = {"only": "learning", "rollouts": sampling.directory}
        learning = _config(tmp_path / name, model, problems, debug=debug, sync={"max_log_prob_gap": None})
        finish(start_ranks(learning, {}))
        learned.append(learning)
    assert all("loss" in step and "sync/seconds" not in step for step in _metrics(learned[0]))
    first, again = (_weights(config, "sparse") for config in learned)
    assert any(not tensor.equal(start[name]) for name, tensor in first.items())
    assert all(tensor.equal(again[name]) for name, tensor in first.items())


@pytest.mark.slow
def test_a_run_checks_itself_from_its_first_step_to_its_last(trained_server, tiny_model, tmp_path):
    problems, model = write_problems(tmp_path / "problems.jsonl"), tiny_model("qwen3")
    config = _config(tmp_path / "run", model, problems, debug={"assertions": True})
    assert config.stages[0].needs_ref_policy and config.stages[1].updates_per_step == 2
    finish(start_ranks(config, {"policy": trained_server, "judge": trained_server}))
    assert len(_metrics(config)) == 5
    said = RunDirectory(config.directory).run_log.read_text()
    assert re.search(
        r"debug\.assertions: nothing differed in 5 weight syncs .*, before 7 updates .*, at most \d.*e-0\d nats "
        r"apart\), in 5 first updates of a step .* and 1 of a stage",
        said,
    )
    assert check_config(config.model_dump(mode="json"), "again").debug.assertions
