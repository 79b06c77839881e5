"""Kernels of gated delta nets: where a model needs them, whether they are looked for where Megatron takes them."""

import ast
from pathlib import Path

import megatron.core
import pytest

from exprl_megatron.config.load import check_config
from exprl_megatron.launch import model_checks
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.policy import delta_net_kernels
from exprl_megatron.policy.delta_net_kernels import MODULE, kernel_violations


@pytest.mark.parametrize(
    ("family", "cuda", "installed", "refused"),
    [
        ("qwen3.5", True, False, True),
        ("qwen3.5", True, True, False),
        ("qwen3.5", False, False, False),
        ("qwen3", True, False, False),
    ],
)
def test_gated_delta_nets_are_refused_on_cuda_without_their_kernels(
    tiny_model, monkeypatch, family, cuda, installed, refused
):
    monkeypatch.setattr(delta_net_kernels, "has_delta_net_kernels", lambda: installed)
    found = kernel_violations(read_architecture(tiny_model(family)), cuda)
    assert (
        found
        == [
            "policy.model is a qwen3.5 model with gated delta nets, whose kernels on CUDA are those of "
            "flash-linear-attention, which is not installed; install fla-core as requirements/gpu.txt pins it."
        ]
        * refused
    )


@pytest.mark.parametrize(("module", "there"), [("json", True), ("no_such_module", False)])
def test_kernels_are_there_where_their_module_is(monkeypatch, module, there):
    monkeypatch.setattr(delta_net_kernels, "MODULE", module)
    assert delta_net_kernels.has_delta_net_kernels() == there


def test_a_run_is_asked_for_them_before_it_starts(tiny_model, monkeypatch):
    asked = []
    monkeypatch.setattr(model_checks, "kernel_violations", lambda *arguments: asked.append(arguments) or ["refused"])
    monkeypatch.setattr(model_checks, "uses_cuda", lambda: True)
    model = tiny_model("qwen3.5")
    assert "refused" in model_checks.model_violations(_sft(model))
    assert asked == [(read_architecture(model), True)]


def _sft(model: Path):
    problems = {"source": "problems.jsonl"}
    stage = {"kind": "sft", "name": "a", "steps": 1, "problems": problems}
    return check_config({"directory": "run", "policy": {"model": str(model)}, "stages": [stage]}, "test")


def test_megatron_takes_its_kernels_from_the_module_that_is_looked_for():
    common = Path(megatron.core.__file__).parent / "ssm/gated_delta_net/common.py"
    (attempt,) = (node for node in ast.parse(common.read_text()).body if isinstance(node, ast.Try))
    taken = {
        f"{node.module}.{name.name}" for node in attempt.body if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert taken == {
        "fla.modules.convolution.causal_conv1d",
        "fla.modules.l2norm.l2norm",
        "fla.ops.gated_delta_rule.chunk_gated_delta_rule",
    }
    assert all(name.split(".")[0] == MODULE for name in taken)
