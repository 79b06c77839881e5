"""Trainer and servers have the NCCL environment that SGLang gives its own processes, and the user's where it is set."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.launch.ranks import rank_environment
from exprl_megatron.serving.server_command import server_environment

DETERMINISTIC = "--enable-deterministic-inference"
CASES = {
    "plain": (1, (), {}),
    "tensor parallel": (2, (), {}),
    "deterministic": (1, (DETERMINISTIC,), {}),
    "deterministic, tensor parallel": (2, (DETERMINISTIC,), {}),
    "deterministic, other channels": (2, (DETERMINISTIC,), {"SGLANG_DETERMINISTIC_NCCL_NCHANNELS": "4"}),
    "on policy, tensor parallel": (2, ("--rl-on-policy-target", "fsdp"), {}),
    "NVLink sharp": (1, ("--enable-nccl-nvls",), {}),
    "NVLink sharp against the user": (1, ("--enable-nccl-nvls",), {"NCCL_NVLS_ENABLE": "0"}),
    "the user's": (1, (), {"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "1"}),
    "the user's 0": (2, (), {"NCCL_CUMEM_ENABLE": "0"}),
}

# Prints what SGLang makes of the environment that it starts in.
SGLANG = """
import json, os, sys
from sglang.srt.entrypoints.engine import _set_envs_and_config
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args
load_plugins()
model, cases = sys.argv[1], json.loads(sys.argv[2])
command = ["--model-path", model, "--device", "cpu", "--attention-backend", "torch_native"]
for name, (arguments, environment) in cases.items():
    for variable in [variable for variable in os.environ if "NCCL_" in variable]:
        del os.environ[variable]
    os.environ.update(environment)
    resolved = prepare_server_args([*command, "--disable-overlap-schedule", *arguments])
    resolved.resolve_once()
    _set_envs_and_config(resolved)
    print("FOUND", json.dumps([name, {k: v for k, v in os.environ.items() if k.startswith("NCCL_")}]))
"""
# Registration of buffers in a process's own CUDA graphs.
LOCAL = {"NCCL_GRAPH_REGISTER"}


def nccl(environment) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith("NCCL_") and name not in LOCAL}


def both(tp, arguments, inherited) -> tuple[dict[str, str], dict[str, str]]:
    """The NCCL variables of a rank and of a server."""
    server = ServerConfig(tp=tp, extra_args=arguments)
    return (
        nccl(rank_environment(inherited, server)),
        nccl(server_environment(inherited, cuda=True, tp=tp, extra_args=arguments)),
    )


@pytest.mark.parametrize("name", CASES)
def test_trainer_and_servers_have_one_nccl_environment(name):
    rank, server = both(*CASES[name])
    assert rank == server and {"NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"} <= rank.keys()


def test_what_the_user_set_reaches_both_sides():
    set_by_user = {"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "1", "NCCL_SOCKET_IFNAME": "eth1"}
    assert both(1, (), set_by_user) == (set_by_user, set_by_user)


def test_symmetric_memory_is_switched_on_for_both_sides_whatever_the_user_set():
    wanted = {"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "1"}
    assert both(1, ("--enable-symm-mem",), {"NCCL_CUMEM_ENABLE": "0"}) == (wanted, wanted)


@pytest.mark.parametrize("arguments", [("--moe-a2a-backend", "deepep_v2"), ("--moe-a2a-backend=deepep_v2",)])
def test_deepep_has_the_memory_that_it_needs_unless_the_user_says_otherwise(arguments):
    assert both(1, arguments, {})[0]["NCCL_CUMEM_ENABLE"] == "1"
    assert both(1, arguments, {"NCCL_CUMEM_ENABLE": "0"})[1]["NCCL_CUMEM_ENABLE"] == "0"


def test_ranks_alone_are_set_up_for_overlap_and_without_the_beta_of_flash_attention():
    wanted = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NVTE_FLASH_ATTN_V4": "0"}
    found = rank_environment({}, ServerConfig())
    assert {name: found[name] for name in wanted} == wanted
    assert not wanted.keys() & server_environment({}, cuda=True).keys()
    users = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "NVTE_FLASH_ATTN_V4": "1"}
    found = rank_environment(users, ServerConfig())
    assert {name: found[name] for name in users} == users


@pytest.mark.slow
def test_sglang_changes_nothing_of_the_environment_that_its_servers_get(tiny_model):
    """Its own code, which would set what is not set, and override what the arguments demand."""
    cases = {
        name: (["--tp-size", str(tp), *arguments], dict(inherited) | both(tp, arguments, inherited)[1])
        for name, (tp, arguments, inherited) in CASES.items()
    }
    environment = server_environment(os.environ, cuda=False) | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", SGLANG, str(tiny_model("qwen3")), json.dumps(cases)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(json.loads(line.removeprefix("FOUND ")) for line in done.stdout.splitlines() if "FOUND" in line)
    assert {name: nccl(values) for name, values in found.items()} == {name: both(*CASES[name])[0] for name in CASES}
