"""What tests/gpu does on CUDA, done on a CPU: the same functions, in fp32, bf16 and emulated FP8, over gloo."""

from functools import cache

import pytest
import torch
from helpers.forking import starter
from helpers.under_nccl import connected, faults, knows_backend

from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.policy.policy import Policy
from exprl_megatron.policy.world import enter_world, leave_world
from exprl_megatron.serving.server_process import launch_servers, stop_servers, wait_servers
from exprl_megatron.utils.accelerator import GROUP_BACKEND
from on_device.compared import failed
from on_device.learning import REFERENCE_STEPS, Learned, beside_reference, cosine, learn, learn_in_layout
from on_device.servers import small_server, takes_weights
from on_device.syncs import syncs

PROMPTS = [(5, 6, 7, 8 + i) for i in range(4)]


@cache
def learned(kind: str) -> Learned:
    """What a test of `kind` has learned, for those that look at it too."""
    return learn(PrecisionConfig(kind=kind, emulate=kind.startswith("fp8")), REFERENCE_STEPS)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp8-tensorwise"])
def test_training_steps_are_those_of_transformers_as_near_as_the_precision_allows(kind):
    assert failed(beside_reference(kind, learned(kind))) == []


def test_a_precision_is_not_taken_for_a_finer_one():
    found = failed(beside_reference("bf16", learned("fp8-tensorwise")))
    assert [one.what for one in found] == ["bf16: cosine of step 1's gradient"]


def test_the_cosine_is_that_of_the_angle():
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])) == pytest.approx(2**-0.5)


@pytest.mark.slow
def test_training_steps_of_several_ranks(tmp_path):
    steps = learn_in_layout(Layout(tp=2), "fp32", tmp_path / "out")
    assert failed(beside_reference("fp32", steps)) == []


@pytest.mark.slow
def test_a_server_takes_the_policy_s_weights(trained_server, tiny_model, tmp_path):
    config = PolicyConfig(model=str(tiny_model("qwen3", seed=7)), precision="fp32")
    enter_world(config.layout)
    try:
        compared = takes_weights(trained_server, Policy(config, seed=0), PROMPTS, tmp_path / "sync")
    finally:
        leave_world()
    assert failed(compared) == []


@pytest.mark.slow
def test_syncs_to_servers_that_never_come_and_that_die(trained_server, tiny_model, tmp_path, monkeypatch):
    """Over the test backend with NCCL's behavior, in which a member that never comes blocks a thread for ever."""
    for name, value in (knows_backend(tmp_path) | {"NCCL_LIKE_PATIENCE_S": ""}).items():
        monkeypatch.setenv(name, value)
    specs = [small_server(name, tiny_model("qwen3"), tmp_path / "logs", None) for name in ("first", "second")]
    # The second one's environment is looked at, which a forked process does not show.
    first, second = servers = launch_servers(specs[:1], starter()) + launch_servers(specs[1:])
    wait_servers(servers)
    monkeypatch.setenv(GROUP_BACKEND, "nccl_like")
    try:
        pairs = {"broadcast": (first, second), "direct": (second, trained_server)}
        settings = {"precision": "fp32", "deadline_s": 5.0, "layout": Layout(pp=2)}
        compared = syncs(tmp_path / "out", tiny_model("qwen3", seed=7), pairs, **settings)
    finally:
        stop_servers(servers)
    assert failed(compared) == []
    assert faults(tmp_path) == [] and connected(tmp_path)
