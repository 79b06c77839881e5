import subprocess
import sys

import pytest
import torch

from exprl_megatron.policy import cpu_platform
from exprl_megatron.utils.accelerator import uses_cuda

pytestmark = pytest.mark.skipif(uses_cuda(), reason="for machines without CUDA")


def run(code: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_or_the_architecture_does_not_import_torch():
    code = "import sys, exprl_megatron.models.architecture; print('torch' in sys.modules, 'megatron' in sys.modules)"
    assert run(code) == "False False"


@pytest.fixture(scope="module")
def imported_after():
    """What a process says that imports Megatron after the package."""
    code = """
import exprl_megatron.policy
import torch
from megatron.core.optimizer import clip_grads
seen = clip_grads.torch
print(seen.cuda.current_device(), seen.zeros(1, device="cuda").device, torch.cuda.is_available())
import sys
import megatron.core.transformer.moe.router
print("torch._inductor.compile_fx" in sys.modules, torch.compile.__module__)
from torch.distributed.distributed_c10d import Backend
print(Backend._plugins["GLOO"].creator_fn.__module__)
"""
    return run(code).splitlines()


def test_megatron_imported_after_the_package_sees_the_cpu_as_its_device(imported_after):
    # Nor does importing Megatron import the compilers of torch.compile, which it decorates with.
    assert imported_after[:2] == ["cpu cpu False", "False torch"]


def test_groups_share_a_gloo_device_once_megatron_is_imported(imported_after):
    assert imported_after[2:] == ["exprl_megatron.utils.gloo_device"]


def test_megatron_imported_before_the_package_is_an_error(tmp_path, monkeypatch):
    """By its name alone: an empty package that is called like it takes the time of none."""
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    for name in ("__init__", "utils"):
        (tmp_path / "megatron" / "core" / f"{name}.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = """
import megatron.core.utils
try:
    import exprl_megatron.policy
except RuntimeError as error:
    print(error)
"""
    assert "import the latter first" in run(code)


def test_nothing_is_installed_where_cuda_is(monkeypatch):
    monkeypatch.setattr(cpu_platform, "hide_unused_cuda", lambda: True)
    finders = list(sys.meta_path)
    assert cpu_platform.install() is False
    assert sys.meta_path == finders


def test_factories_read_cuda_as_cpu_and_drop_pinned_memory():
    view = cpu_platform.VIEW
    for device in ("cuda", "cuda:1", torch.device("cuda", 0)):
        assert view.zeros(2, device=device).device.type == "cpu"
    assert view.tensor([1.0], pin_memory=True).tolist() == [1.0]
    assert view.ones(2, device="meta").device.type == "meta"


def test_the_view_forwards_everything_else():
    assert cpu_platform.VIEW.nn is torch.nn
    assert cpu_platform.VIEW.cuda.is_available() is False


def test_random_states_of_the_device_are_those_of_the_cpu():
    cuda = cpu_platform.VIEW.cuda
    before = torch.get_rng_state()
    cuda.manual_seed(7)
    state = cuda.get_rng_state()
    first = torch.rand(3)
    cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    torch.set_rng_state(before)


def test_streams_and_events_do_nothing():
    cuda = cpu_platform.VIEW.cuda
    stream = cuda.current_stream()
    stream.wait_stream(cuda.Stream())
    stream.wait_event(stream.record_event())
    with cuda.stream(stream):
        cuda.synchronize()


def test_tensor_types_are_named_after_cuda_only_inside_the_wrapped_functions():
    inside = cpu_platform._named_as_cuda(lambda tensor: tensor.type())
    assert inside(torch.zeros(1)) == "torch.cuda.FloatTensor"
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises(AttributeError):
        inside(None)
    assert torch.zeros(1).type() == "torch.FloatTensor"
