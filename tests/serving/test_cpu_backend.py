"""The packages that stand in for CUDA ones in servers on a machine without CUDA."""

import importlib
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from exprl_megatron.config.resuming import FREE_ARGUMENTS
from exprl_megatron.models import qwen3_5
from exprl_megatron.serving.server_command import CPU_BACKEND, server_environment

ROOT = Path(__file__).parents[2]
_OURS = ("exprl_cpu_delta_net", "exprl_placeholder", "sgl_kernel", "torchvision")


@pytest.fixture(scope="module")
def stub():
    """Imports a stand-in by name; once for all tests here, as its operator can be registered only once."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(CPU_BACKEND)
        yield importlib.import_module
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in _OURS:
            del sys.modules[name]


def murmur3(data: bytes, seed: int) -> int:
    """MurmurHash3_x86_32 as published by Austin Appleby, over whole bytes, in plain integers."""

    def scramble(k):
        k = k * 0xCC9E2D51 & 0xFFFFFFFF
        return (k << 15 | k >> 17) % 2**32 * 0x1B873593 % 2**32

    h, whole = seed, len(data) // 4 * 4
    for (k,) in struct.iter_unpack("<I", data[:whole]):
        h ^= scramble(k)
        h = ((h << 13 | h >> 19) % 2**32 * 5 + 0xE6546B64) % 2**32
    h ^= scramble(int.from_bytes(data[whole:], "little")) if len(data) > whole else 0
    h ^= len(data)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ h >> shift) * factor % 2**32
    return h ^ h >> 16


def test_the_plain_murmur3_gives_the_published_values():
    assert murmur3(b"", 1) == 0x514E28B7
    assert murmur3(b"test", 0) == 0xBA6BD213
    assert murmur3(b"Hello, world!", 0x9747B28C) == 0x24884CBA
    assert murmur3(b"The quick brown fox jumps over the lazy dog", 0x9747B28C) == 0x2FA826CD


def test_the_hash_of_seeded_sampling_is_murmur3_of_seed_position_and_column(stub):
    stub("sgl_kernel")
    seeds = torch.tensor([0, 1, 42, 2**31 - 1, 2**40 + 17, 2**63 - 1])
    positions = torch.tensor([0, 5, 2**31 - 1, 1000, 7, 3])
    columns = torch.cat([torch.tensor([0, 1, 127, 151_935]), torch.arange(3, 152_000, 1999)])
    for given in (seeds.to(torch.uint64), seeds):
        hashed = torch.ops.sgl_kernel.murmur_hash32_cpu.default(given, positions, columns)
        assert hashed.dtype == torch.uint32
        assert hashed.tolist() == [
            [murmur3(struct.pack("<QII", s, p, c), 0) for c in columns.tolist()]
            for s, p in zip(seeds.tolist(), positions.tolist(), strict=True)
        ]


def test_a_placeholder_may_be_imported_but_not_called(stub):
    kernels = stub("sgl_kernel")
    with pytest.raises(NotImplementedError, match=r"sgl_kernel\.fused_marlin_moe does not exist on a machine without"):
        kernels.fused_marlin_moe(1, gate=2)
    with pytest.raises(AttributeError):
        _ = kernels.__wrapped__
    with pytest.raises(ImportError):
        stub("sgl_kernel.scalar_type")


def test_torchvision_answers_every_name_that_transformers_and_sglang_import(stub):
    transforms = stub("torchvision.transforms")
    functional = stub("torchvision.transforms.v2.functional")
    assert functional.InterpolationMode.NEAREST_EXACT.value == "nearest-exact"
    assert transforms.InterpolationMode is functional.InterpolationMode
    for use in (transforms.Compose, functional.resize, stub("torchvision.io").decode_image):
        with pytest.raises(NotImplementedError, match="torchvision"):
            use([])


@pytest.mark.slow
def test_a_built_wheel_carries_every_stand_in_and_plugin(tmp_path):
    """They are data of the package: a pattern that misses a file breaks only installed copies."""
    copy = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files", "setup.py", "pyproject.toml", "exprl_megatron"], cwd=ROOT,
                             capture_output=True, text=True, check=True).stdout.split()  # fmt: skip
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    build = "from setuptools.build_meta import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=copy, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "exprl_megatron/py.typed" in zipfile.ZipFile(wheel).namelist()
    for place in ("/cpu_backend/", "/plugins/"):
        carried = {n for n in zipfile.ZipFile(wheel).namelist() if place in n}
        assert carried == {name for name in tracked if place in name}
        assert any(name.endswith("dist-info/entry_points.txt") for name in carried)


ACTIVATED = """
import exprl_sglang_on_cpu
exprl_sglang_on_cpu.activate()
from torch.distributed.distributed_c10d import Backend
from exprl_megatron.utils import gloo_device
shared = Backend._plugins["GLOO"].creator_fn is gloo_device._group
import argparse, json, torch
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
arguments = [name for action in parser._actions for name in action.option_strings]
import exprl_sglang_models.qwen3_5
from sglang.srt.models.qwen2_moe import fused_gate_sigmoid_mul_add
from sglang.srt.plugins.hook_registry import HookRegistry
HookRegistry.apply_hooks()
output = torch.tensor([[1.0, 2.0]])
fused_gate_sigmoid_mul_add(torch.tensor([[3.0, -1.0]]), torch.tensor([1.0, 3.0]), torch.tensor([[4.0, 6.0]]), output)
classes = [kind.__name__ for kind in exprl_sglang_models.qwen3_5.EntryClass]
print(json.dumps([shared, arguments, classes, output.tolist()]))
"""


@pytest.fixture(scope="module")
def activated():
    """Of a server's process on a CPU: whether its groups share a gloo device, SGLang's arguments, classes of Qwen3.5.

    At last what its kernel for a shared expert, with the logit 0 of its gate, makes of routed [1, 2] and shared [4, 6].
    """
    environment = server_environment(os.environ, cuda=False)
    done = subprocess.run(
        [sys.executable, "-c", ACTIVATED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_groups_of_a_server_on_a_cpu_share_a_gloo_device(activated):
    assert activated[0] is True


def test_the_arguments_that_may_change_are_sglangs(activated):
    assert set(FREE_ARGUMENTS) <= set(activated[1])


def test_a_server_has_a_class_for_every_architecture_of_qwen3_5(activated):
    assert sorted(activated[2]) == sorted(qwen3_5.NAMES)


def test_sglang_s_kernel_for_a_shared_expert_is_replaced_where_the_model_calls_it(activated):
    """The gate is the sigmoid of 0."""
    assert activated[3] == [[1.0 + 4.0 / 2, 2.0 + 6.0 / 2]]
