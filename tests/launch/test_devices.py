"""Where a run's own servers are put on a machine with GPUs."""

import os

import pytest

from exprl_megatron.config.load import check_config
from exprl_megatron.errors import UserError
from exprl_megatron.launch import launcher as launch_module
from exprl_megatron.launch.devices import assign_gpus
from exprl_megatron.launch.launcher import required_servers
from exprl_megatron.processes.starter import Starter
from exprl_megatron.runs.directory import RunDirectory


def config(tmp_path, **changes):
    stage = {"kind": "exprl-outcome", "name": "prime", "steps": 1, "problems": {"source": "p.jsonl"}}
    tree = {
        "directory": str(tmp_path),
        "policy": {"model": "m", "layout": {"tp": 2}},
        "server": {"count": 2, "tp": 2, "router": True},
        "judge": {"model": "j", "server": {"tp": 2}},
        "stages": [stage],
    }
    return check_config(tree | changes, "test")


def first_gpus(config, tmp_path, gpus):
    return {
        spec.name: spec.first_gpu
        for spec in assign_gpus(required_servers(config, RunDirectory(tmp_path)), config, gpus)
    }


def test_servers_are_on_the_gpus_behind_the_trainer_s(tmp_path):
    expected = {"policy-0": 2, "policy-1": 4, "router-0": 0, "judge-0": 6}
    assert first_gpus(config(tmp_path), tmp_path, 8) == expected


def test_sampling_servers_that_take_turns_with_the_trainer_are_on_its_gpus(tmp_path):
    colocated = config(tmp_path, placement={"kind": "colocated"}, sync={"transport": "handles"})
    expected = {"policy-0": 0, "policy-1": 2, "router-0": 0, "judge-0": 4}
    assert first_gpus(colocated, tmp_path, 6) == expected


def test_too_few_gpus_are_reported_before_anything_starts(tmp_path):
    with pytest.raises(UserError, match=r"needs 2 GPUs .* \(policy-0 2, policy-1 2, judge-0 2\): 8 in total, of 4; "):
        first_gpus(config(tmp_path), tmp_path, 4)
    specs = required_servers(config(tmp_path), RunDirectory(tmp_path))
    assert assign_gpus(specs, config(tmp_path), 0) == specs, "without GPUs nothing is placed"


@pytest.fixture
def started(monkeypatch, tmp_path):
    """`started(**sections)`: a start of such a run, which has no processes."""
    for name in ("check_servers", "_run"):
        monkeypatch.setattr(launch_module, name, lambda *_: None)
    monkeypatch.setattr(launch_module, "starter", lambda *_, **__: Starter())
    monkeypatch.setattr(launch_module, "hash_checked_inputs", lambda *_: {})
    # A start sets it for its processes; it is as before when the test ends.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")

    def start(registered=False, **sections):
        launch_module.launch(config(tmp_path / "run", **sections), resume=False, registered=registered)

    return start


@pytest.mark.parametrize(
    ("cuda", "extra_args", "times"),
    [(True, [], 1), (True, ["--enable-deterministic-inference"], 0), (False, [], 0)],
)
def test_a_run_says_once_that_its_sampling_is_not_reproducible(started, monkeypatch, capsys, cuda, extra_args, times):
    monkeypatch.setattr(launch_module, "uses_cuda", lambda: cuda)
    started(server={"extra_args": extra_args})
    assert capsys.readouterr().out.count("Sampling on CUDA is not reproducible") == times


@pytest.mark.parametrize(("registered", "interface"), [(False, "lo"), (True, None)])
def test_ranks_beside_their_own_servers_meet_over_loopback(started, registered, interface):
    started(registered)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == interface


@pytest.mark.parametrize(("reproduce", "reported"), [(None, False), ("released", True)])
def test_a_start_that_reproduces_the_released_code_reports_each_departure(started, capsys, reproduce, reported):
    started(reproduce=reproduce, judge={"model": "j", "server": {"tp": 2}, "reasks": 3})
    assert ("reproduce is released, but judge.reasks is 3" in capsys.readouterr().err) == reported
