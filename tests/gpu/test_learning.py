"""What the GPU tests measure with, tried where no GPU is."""

import pytest
import torch
from learning import cosine, learn

from exprl_megatron.accelerator import uses_cuda
from exprl_megatron.config.precision import PrecisionConfig


@pytest.fixture(scope="module")
def fp32():
    return learn(PrecisionConfig(kind="fp32"), 6)


def test_the_miniature_learns(fp32):
    assert fp32.losses[-1] < 0.9 * fp32.losses[0]
    assert fp32.gradient.dtype == torch.float32 and fp32.gradient.isfinite().all()


@pytest.mark.skipif(uses_cuda(), reason="the GPU tests compare with bf16 themselves")
@pytest.mark.parametrize(
    ("precision", "least"),
    [({"kind": "bf16"}, 0.99), ({"kind": "fp8-tensorwise", "emulate": True}, 0.95)],
)
def test_a_coarser_precision_is_near_fp32_and_not_the_same(fp32, precision, least):
    coarse = learn(PrecisionConfig(**precision), 6)
    assert least <= cosine(coarse.gradient, fp32.gradient) < 1 - 1e-9
    assert coarse.losses == pytest.approx(fp32.losses, rel=0.1)


def test_the_cosine_is_that_of_the_angle():
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])) == pytest.approx(2**-0.5)
