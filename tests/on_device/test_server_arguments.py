"""SGLang's own parser accepts the arguments of every server that the GPU tests start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from exprl_megatron.config import precision
from exprl_megatron.config.load import check_config
from exprl_megatron.config.placement import COLOCATED_MEM_FRACTION
from exprl_megatron.config.transport import choose_transport
from exprl_megatron.launch import launcher as launch
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.serving import keyed_server
from exprl_megatron.serving.server_command import server_command, server_environment
from exprl_megatron.serving.server_spec import ServerSpec
from on_device.colocated import config_tree
from on_device.learning import MODEL
from on_device.servers import CAN_SLEEP, FP8, small_server

PARSE = """
import json, sys
from sglang.srt.server_args import prepare_server_args

names = ("base_gpu_id", "dtype", "tp_size", "quantization", "load_format", "enable_memory_saver", "mem_fraction_static")
for arguments in json.load(sys.stdin):
    parsed = prepare_server_args(arguments)
    print("parsed", json.dumps({name: getattr(parsed, name) for name in names}))
"""


def arguments(spec: ServerSpec) -> list[str]:
    """What such a server's SGLang is given on CUDA, without the module that starts it."""
    command = server_command(
        spec.model,
        spec.config,
        dtype=spec.dtype,
        port=30000,
        seed=spec.seed,
        weight_version=spec.weight_version,
        cuda=True,
        first_gpu=spec.first_gpu,
    )
    return [*command[command.index(keyed_server.__name__) + 1 :], "--device", "cuda"]


def parsed(specs: list[ServerSpec]) -> list[dict]:
    """What SGLang makes of them, in a process of its own."""
    environment = server_environment(os.environ, cuda=False)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PARSE],
        input=json.dumps([arguments(spec) for spec in specs]),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("parsed ")]
    return [json.loads(line.removeprefix("parsed ")) for line in lines]


@pytest.mark.slow
def test_sglang_accepts_the_arguments_of_the_gpu_tests_servers(tmp_path: Path, monkeypatch):
    for module in (launch, precision):
        monkeypatch.setattr(module, "uses_cuda", lambda: True)
    tree = config_tree(tmp_path / "run", cuda=True, layout={"tp": 2, "pp": 2}, servers={"count": 2, "tp": 2})
    config = check_config(tree, "test")
    assert choose_transport(config).kind == "handles"
    colocated = launch.required_servers(config, RunDirectory(tmp_path / "run"))
    fp8, sleeper = small_server("fp8", MODEL, tmp_path, 0, *FP8), small_server("bf16", MODEL, tmp_path, 1, *CAN_SLEEP)
    found = parsed([fp8, sleeper, *colocated])
    assert [one["tp_size"] for one in found] == [1, 1, 2, 2]
    assert {one["dtype"] for one in found} == {"bfloat16"}
    assert [one["mem_fraction_static"] for one in found] == [0.15, 0.15, *[COLOCATED_MEM_FRACTION] * 2]
    assert (found[0]["quantization"], found[0]["load_format"]) == ("fp8", "flash_rl")
    assert [one["enable_memory_saver"] for one in found] == [False, True, True, True]
    assert [one["base_gpu_id"] for one in found[:2]] == [0, 1]
