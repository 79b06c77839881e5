"""Training steps in bf16 and FP8 on CUDA beside fp32 on the CPU, and FP8 learning as bf16 does."""

from functools import cache

import pytest
import torch
from on_device.compared import near
from on_device.learning import Learned, beside_reference, learn, learn_in_layout

from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.models.precision_matrix import Setting, precision_violations

pytestmark = pytest.mark.gpu
STEPS = 50
PRECISIONS = {
    "bf16": {"kind": "bf16"},
    "fp8-delayed": {"kind": "fp8-delayed"},
    "fp8-tensorwise": {"kind": "fp8-tensorwise"},
    "fp8-tensorwise, ends in bf16": {"kind": "fp8-tensorwise", "first_last_bf16": 1},
    "fp8-tensorwise, FP8 parameters": {"kind": "fp8-tensorwise", "fp8_parameters": True},
    "fp8-blockwise": {"kind": "fp8-blockwise"},
    "mxfp8": {"kind": "mxfp8"},
}


@cache
def learned(name: str) -> Learned:
    return learn(PrecisionConfig(**PRECISIONS[name]), STEPS)


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_precision_learns_as_fp32_does_at_first_and_as_bf16_does_later(name, check):
    precision = PrecisionConfig(**PRECISIONS[name])
    policy = PolicyConfig(model="none", precision=precision)
    if refused := precision_violations(Setting(policy, torch.cuda.get_device_capability())):
        pytest.skip(refused[0])
    rows = beside_reference(precision.kind, learned(name))
    if precision.fp8:
        wanted = learned("bf16").losses[-1]
        rows.append(near(f"{name}: loss of step {STEPS}, beside bf16's", learned(name).losses[-1], wanted, 0.1))
    check(rows)


@pytest.mark.gpus(4)
@pytest.mark.parametrize("kind", ["bf16", "fp8-tensorwise"])
def test_training_steps_at_tp2_pp2(tmp_path, check, kind):
    check(beside_reference(kind, learn_in_layout(Layout(tp=2, pp=2), kind, tmp_path / "out")))
