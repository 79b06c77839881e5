"""One decision on CUDA for trainer, servers and groups; what differs between machines is patched in."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from exprl_megatron.errors import UserError
from exprl_megatron.utils import accelerator

ROOT = Path(__file__).parents[2]
CPU_ENVIRONMENT, GPU_ENVIRONMENT = (), ("transformer_engine", "sgl_kernel")

# Torch sees a GPU as CUDA does: unless CUDA_VISIBLE_DEVICES is set and empty.
PRETEND = """
import os, torch
torch.cuda.is_available = lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != ""
torch.cuda.device_count = lambda: int(torch.cuda.is_available())
"""


@pytest.fixture
def machine(monkeypatch):
    """`machine(gpu, modules)`: whether torch sees a GPU, and which of the GPU environment's modules are installed."""
    import torch

    find_spec = importlib.util.find_spec
    # Each test leaves the variable as it found it.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    def set_up(gpu: bool, modules: tuple[str, ...]) -> None:
        def found(name, package=None):
            if name in accelerator.GPU_PACKAGES:
                return find_spec("json") if name in modules else None
            return find_spec(name, package)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu and os.environ.get("CUDA_VISIBLE_DEVICES") != "")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(torch.cuda.is_available()))
        monkeypatch.setattr(importlib.util, "find_spec", found)

    return set_up


@pytest.mark.parametrize(
    ("gpu", "modules", "cuda"),
    [
        (True, GPU_ENVIRONMENT, True),
        (True, CPU_ENVIRONMENT, False),
        (True, ("transformer_engine",), False),
        (True, ("sgl_kernel",), False),
        (False, GPU_ENVIRONMENT, False),
        (False, CPU_ENVIRONMENT, False),
    ],
)
def test_cuda_needs_a_device_and_both_sides_packages(machine, gpu, modules, cuda):
    machine(gpu, modules)
    assert accelerator.uses_cuda() is cuda
    assert accelerator.gpu_count() == int(cuda)


def test_a_gpu_in_the_cpu_environment_is_reported_once_and_hidden(machine, capfd):
    import torch

    machine(True, CPU_ENVIRONMENT)
    assert accelerator.hide_unused_cuda() is False
    assert accelerator.hide_unused_cuda() is False
    (line,) = capfd.readouterr().err.splitlines()
    for part in (
        "transformer-engine and sglang-kernel",
        "runs on the CPU",
        "requirements/gpu.txt",
        "CUDA_VISIBLE_DEVI",
    ):
        assert part in line
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


def test_a_device_that_the_process_has_opened_already_is_hidden_from_its_libraries(machine, monkeypatch):
    import torch

    machine(True, CPU_ENVIRONMENT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert accelerator.hide_unused_cuda() is False
    assert not torch.cuda.is_available() and torch.cuda.device_count() == 0


def test_nothing_is_reported_without_a_gpu_or_hidden_where_it_is_used(machine, capfd):
    machine(True, GPU_ENVIRONMENT)
    assert accelerator.hide_unused_cuda() is True and os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    machine(False, CPU_ENVIRONMENT)
    assert accelerator.hide_unused_cuda() is False
    assert capfd.readouterr().err == ""


def test_asking_for_a_device_in_the_cpu_environment_leaves_no_variable_behind(machine, monkeypatch):
    machine(True, CPU_ENVIRONMENT)
    assert accelerator.device_visible() and "PYTORCH_NVML_BASED_CUDA_CHECK" not in os.environ
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "0")
    assert accelerator.device_visible() and os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "0"


@pytest.mark.parametrize(
    ("gpu", "modules", "parts"),
    [
        (True, ("transformer_engine",), ("sglang-kernel is not installed", "requirements/gpu.txt", "make setup")),
        (True, ("sgl_kernel",), ("transformer-engine is not installed", "requirements/gpu.txt", "make setup")),
        (False, GPU_ENVIRONMENT, ("no CUDA device is visible", "nvidia-smi", "make setup")),
        (False, ("transformer_engine",), ("no CUDA device is visible", "make setup")),
    ],
)
def test_half_an_environment_is_refused_with_both_remedies_before_anything_is_read(machine, gpu, modules, parts):
    from exprl_megatron.launch.preflight import check_inputs

    machine(gpu, modules)
    with pytest.raises(UserError) as refused:
        check_inputs(None)
    assert all(part in str(refused.value) for part in parts)


@pytest.mark.parametrize(
    ("gpu", "modules"),
    [(True, GPU_ENVIRONMENT), (True, CPU_ENVIRONMENT), (False, CPU_ENVIRONMENT), (False, ("sgl_kernel",))],
)
def test_a_whole_environment_is_not_refused(machine, gpu, modules):
    machine(gpu, modules)
    assert accelerator.installation_fault() is None


DECISIONS = """
import exprl_megatron.policy
from pathlib import Path
from exprl_megatron.config.policy import Layout
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.policy.world import enter_world
from exprl_megatron.utils.accelerator import cuda_capability, group_backend
from exprl_megatron.serving.server_command import server_environment
from exprl_megatron.serving.server_spec import ServerSpec
from exprl_megatron.launch.ranks import rank_environment
from megatron.core.optimizer import clip_grads
import torch.distributed as dist
world = enter_world(Layout())
command = ServerSpec("policy-0", Path("."), ServerConfig(), Path(".")).command(1)
print(world.device, dist.get_backend(), group_backend(), cuda_capability(), clip_grads.torch.cuda.is_available())
print(command[command.index("--device") + 1], "--base-gpu-id" in command)
seen = {"CUDA_VISIBLE_DEVICES": "0"}
children = (server_environment(seen, cuda=False), rank_environment(seen, ServerConfig()), os.environ)
print([child["CUDA_VISIBLE_DEVICES"] for child in children])
"""


def test_in_the_cpu_environment_no_part_of_a_machine_with_a_gpu_chooses_it():
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRETEND + DECISIONS], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["cpu gloo gloo None False", "cpu False", "['', '', '']"]
    assert done.stderr.count("runs on the CPU") == 1


WITHOUT_TORCH = """
import subprocess, sys
from types import SimpleNamespace
from exprl_megatron.utils import accelerator
accelerator._DRIVER = DRIVER
accelerator.GPU_PACKAGES = {}
asked = []
def run(command, **_):
    asked.append(command[1:])
    return SimpleNamespace(returncode=0, stdout="a warning of torch\\n[true, 2]\\n")
subprocess.run = run
print(accelerator.uses_cuda(), accelerator.gpu_count(), len(asked), "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("driver", "said"),
    [(("no-such-library.so.1",), "False 0 0 False"), (("no-such-library.so.1", "libc.so.6"), "True 2 1 False")],
)
def test_a_process_without_torch_has_another_one_ask_it_where_there_is_a_driver(driver, said):
    program = WITHOUT_TORCH.replace("DRIVER\n", f"{driver!r}\n", 1)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == said, done.stderr


def test_the_process_that_is_asked_says_what_torch_sees():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "exprl_megatron.utils.accelerator"], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "[false, 0]\n", done.stderr


def test_nobody_else_asks_torch_whether_there_is_cuda():
    asking = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("exprl_megatron", "recipes", "tools", "tests/gpu")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path != Path(accelerator.__file__)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda.is_available"
    ]
    assert asking == []
