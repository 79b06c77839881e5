"""A policy of experts, learned expert-parallel in Megatron and sampled by SGLang."""

import filecmp
import json
import shutil

import pytest
from helpers.forking import starter
from helpers.runs import SAMPLING, finish, kill_when, run_config, start_ranks, write_problems
from helpers.tiny_models import write_tiny_vision_model
from safetensors.torch import load_file

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.runs.directory import RunDirectory, read_config
from exprl_megatron.runs.journal import Journal
from exprl_megatron.serving.server_process import start_servers
from exprl_megatron.serving.server_spec import ServerSpec

pytestmark = pytest.mark.slow


def _kill_and_compare(config, server, directory):
    """Killed in step 2, resumed, and then learned again from the same traces without an interruption.

    Returns how many steps of the killed run may have a sync: step 2 has one where it ended before the kill arrived.
    """
    paths, whole = RunDirectory(config.directory), RunDirectory(directory)
    sampled = Journal(paths.journal).path("distill", 2)
    kill_when(start_ranks(config, {"policy": server}), sampled.is_file)
    before = sampled.read_bytes()
    in_time = not any('"step": 2' in line for line in paths.metrics.read_text().splitlines())
    finish(start_ranks(config, {"policy": server}, resume=True))
    assert sampled.read_bytes() == before, "traces and their experts were sampled again"
    again = config.model_copy(update={"directory": directory})
    whole.claim(again, resume=False).release()
    shutil.copytree(paths.journal, whole.journal, dirs_exist_ok=True)
    finish(start_ranks(again, {"policy": server}, resume=True))
    name = "distill/model.safetensors"
    assert filecmp.cmp(paths.models / name, whole.models / name, shallow=False), "not bitwise the same"
    return {2} if in_time else {2, 3}


def weights_of(directory):
    """Of a vision model what is copied through is in a file of its own."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("family", "transport"), [("qwen3.5-moe", "broadcast"), ("qwen3-moe", "direct")])
def test_a_policy_of_experts_is_sampled_under_the_weights_that_it_has_learned(tiny_model, tmp_path, family, transport):
    model, problems = tiny_model(family), write_problems(tmp_path / "problems.jsonl")
    if family == "qwen3.5-moe":
        model = write_tiny_vision_model(tmp_path / "vision", model)
    # Verified rewards of an untrained model are all 0 and teach nothing.
    stage = {
        "kind": "self-distill",
        "name": "distill",
        "steps": 3,
        "problems": {"source": str(problems)},
        "problems_per_step": 2,
        "group_size": 3,
        "sampling": SAMPLING,
        "optimizer": {"lr": 1e-3},
        "teacher_prompt": {"user": "{problem} {reference}"},
    }
    policy = {"model": str(model), "layout": {"dp": 2, "ep": 2}, "max_tokens": 160}
    config = run_config(
        tmp_path / "run", model, model, problems, policy=policy, stages=[stage], sync={"transport": transport}
    )
    server = ServerConfig(
        request_deadline_s=120, max_total_tokens=16384, extra_args=("--enable-return-routed-experts",)
    )
    paths = RunDirectory(config.directory)
    with start_servers([ServerSpec("policy-0", model, server, tmp_path)], starter())[0] as started:
        if transport == "direct":
            syncs = _kill_and_compare(config, started, tmp_path / "whole")
        else:
            syncs = {3}
            finish(start_ranks(config, {"policy": started}))
    assert read_config(paths).policy.router_replay, "the default for a mixture"
    for step in (1, 2, 3):
        (*groups,) = Journal(paths.journal).read("distill", step).groups
        traces = [member.trace for group in groups for member in group.samples]
        assert all(len({*ids}) == 2 for trace in traces for row in trace.routed_experts.tolist() for ids in row)
    before, after = (weights_of(path) for path in (model, paths.models / "distill"))
    assert before.keys() == after.keys()
    experts = [name for name in before if ".experts." in name]
    assert experts and not any(before[name].equal(after[name]) for name in experts)
    steps = [json.loads(line)["metrics"] for line in paths.metrics.read_text().splitlines()]
    assert len(steps) == 3
    # Each sync compared the checksums of all experts; were they not the trainer's, or did the trainer take experts for
    # other tokens than the server, the log-probs would differ too. The killed run had step 2's traces already.
    synced = [step["sync/check"] > 0 for step in steps if "sync/check" in step]
    assert all(synced) and len(synced) in syncs
    assert all(step["sampler_gap/max"] <= 1e-4 for step in steps)
