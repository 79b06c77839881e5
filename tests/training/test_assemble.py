"""Where a run's policy starts, and with which clients it talks to the judge; nothing is opened."""

from pathlib import Path

from exprl_megatron.config.load import check_config
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.runs.progress import RunProgress
from exprl_megatron.serving.openai_endpoint import OpenAIEndpoint
from exprl_megatron.serving.registered_client import RegisteredClient
from exprl_megatron.serving.registry import Registry
from exprl_megatron.serving.router import RoutedClient
from exprl_megatron.serving.shared_judge import SharedJudgeClient
from exprl_megatron.training.assemble import _initial_policy, _judges


def config(directory, kinds=("exprl-outcome", "sparse-rl"), **changes):
    shared = {"problems": {"source": "p"}, "steps": 1}
    tree = {
        "directory": str(directory),
        "policy": {"model": "first", "initialize": "weights"},
        "judge": {"model": "j", "server": {"count": 2}},
        "server": {"count": 3},
        "stages": [shared | {"kind": kind, "name": f"stage-{i}"} for i, kind in enumerate(kinds)],
    }
    return check_config(tree | changes, "test")


def test_a_stage_starts_from_the_model_that_the_stage_before_it_left(tmp_path):
    made, paths = config(tmp_path), RunDirectory(tmp_path)
    assert _initial_policy(made, paths, RunProgress(stage=0, step=3)) == made.policy
    second = _initial_policy(made, paths, RunProgress(stage=1))
    assert second == made.policy.model_copy(update={"model": str(paths.models / "stage-0")})


def test_a_model_that_was_drawn_at_random_is_read_from_the_second_stage_on(tmp_path):
    sft = {"kind": "sft", "examples": "e.jsonl", "steps": 1}
    stages = [sft | {"name": "a"}, sft | {"name": "b"}]
    made = config(tmp_path, policy={"model": "first", "initialize": "random"}, stages=stages, judge=None)
    assert _initial_policy(made, RunDirectory(tmp_path), RunProgress()).initialize == "random"
    assert _initial_policy(made, RunDirectory(tmp_path), RunProgress(stage=1)).initialize == "weights"


def clients(directory, **judge):
    made = config(directory, judge={"model": "j", "server": {"count": 2}} | judge)
    return _judges(made, Registry(directory / "servers"), "the pool")


def test_each_way_to_judge_has_its_clients(tmp_path):
    own = clients(tmp_path)
    assert [type(client) for client in own] == [RegisteredClient] * 2
    assert [client.name for client in own] == ["judge-0", "judge-1"]
    shared = clients(tmp_path, placement="policy", gate=None)
    assert [type(client) for client in shared] == [SharedJudgeClient] * 3, "one for each of the policy's servers"
    assert [client.name for client in shared] == ["policy-0", "policy-1", "policy-2"]
    (routed,) = clients(tmp_path, server={"count": 2, "router": True})
    assert isinstance(routed, RoutedClient)
    urls = ["http://one/v1", "http://two/v1"]
    endpoints = clients(tmp_path, endpoints=urls, endpoint_model="m")
    assert [type(client) for client in endpoints] == [OpenAIEndpoint] * 2


def test_a_run_that_grades_by_answers_alone_has_no_judge(tmp_path):
    made = config(tmp_path, kinds=("sparse-rl",))
    assert _judges(made, Registry(Path(tmp_path) / "servers"), None) == []
