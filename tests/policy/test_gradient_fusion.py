"""`policy.gradient_accumulation_fusion`: on where apex is, off or refused where it cannot work."""

import sys
import types

import pytest
import torch
from benchmarks.layers import Work, policy_config

from exprl_megatron.config.policy import PolicyConfig
from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.policy.gradient_fusion import fusion_violations, has_fused_kernel
from exprl_megatron.policy.model import transformer_config

KERNEL = "fused_weight_gradient_mlp_cuda"


@pytest.fixture
def apex(monkeypatch):
    """`apex(True)`: its kernel can be imported; `apex(False)`: it cannot."""

    def set_up(installed: bool) -> None:
        monkeypatch.setitem(sys.modules, KERNEL, types.ModuleType(KERNEL) if installed else None)

    return set_up


def policy(fusion: bool | None = None, kind: str = "bf16") -> PolicyConfig:
    return PolicyConfig(model="m", precision=PrecisionConfig(kind=kind), gradient_accumulation_fusion=fusion)


@pytest.mark.parametrize(
    ("installed", "device", "fusion", "kind", "fused"),
    [
        (True, "cuda", None, "bf16", True),
        (True, "cuda", None, "auto", True),
        (True, "cuda", True, "bf16", True),
        (True, "cuda", False, "bf16", False),
        (True, "cuda", None, "fp8-tensorwise", False),
        (True, "cuda", None, "fp32", False),
        (True, "cpu", None, "bf16", False),
        (False, "cuda", None, "bf16", False),
    ],
)
def test_megatron_is_asked_to_fuse_where_apex_is(tiny_model, apex, installed, device, fusion, kind, fused):
    apex(installed)
    megatron = transformer_config(read_architecture(tiny_model("qwen3")), policy(fusion, kind), torch.device(device))
    assert megatron.gradient_accumulation_fusion is fused
    # Otherwise a pass that is not the first of a step overwrites what those before it have added.
    assert megatron.disable_parameter_transpose_cache is fused


def test_the_kernel_is_looked_for_as_megatron_does(apex):
    apex(True)
    assert has_fused_kernel()
    apex(False)
    assert not has_fused_kernel()


@pytest.mark.parametrize(
    ("installed", "cuda", "kind", "sentence"),
    [
        (False, True, "bf16", "apex is not installed (build the image with --build-arg APEX=25.09)"),
        (True, True, "fp8-blockwise", "policy.precision is fp8-blockwise, and only bf16 gradients are fused"),
        (True, True, "fp32", "policy.precision is fp32, and only bf16 gradients are fused"),
        (True, False, "bf16", "this machine does not run on CUDA"),
    ],
)
def test_a_fusion_that_is_not_available_is_refused(apex, installed, cuda, kind, sentence):
    apex(installed)
    (found,) = fusion_violations(policy(True, kind), cuda)
    assert sentence in found and found.startswith("policy.gradient_accumulation_fusion is true, but")
    assert fusion_violations(policy(None, kind), cuda) == fusion_violations(policy(False, kind), cuda) == []


def test_a_fusion_that_is_available_is_not_refused(apex):
    apex(True)
    assert fusion_violations(policy(True), cuda=True) == []


def test_layers_without_megatrons_buffers_are_not_measured_with_it(tiny_model):
    work = Work(read_architecture(tiny_model("qwen3")), 1, 8, 1)
    assert policy_config(work, "bf16", 1).gradient_accumulation_fusion is False
