"""Products of a few rows in servers on a CPU: the same numbers, and what is left to SGLang."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from exprl_megatron.serving.server_command import CPU_BACKEND


@pytest.fixture
def products():
    """The CPU backend's module."""
    spec = importlib.util.spec_from_file_location("exprl_cpu_linear", CPU_BACKEND / "exprl_cpu_linear.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _left(*_):
    return "left to SGLang"


@pytest.mark.parametrize("rows", [2, 3, 4])
@pytest.mark.parametrize("shape", [(48, 16), (16, 16), (1024, 16)])
def test_a_few_rows_are_multiplied_as_in_torch(products, rows, shape):
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, shape[1], generator=generator), torch.randn(shape, generator=generator)
    found = products.linear(_left, None, SimpleNamespace(weight=weight), x)
    expected = torch.einsum("rk,nk->rn", x.double(), weight.double())
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert found.is_contiguous()


@pytest.mark.parametrize(
    ("rows", "shape", "dtype", "more"),
    [
        (1, (48, 16), torch.float32, {}),
        (5, (48, 16), torch.float32, {}),
        (9, (1024, 16), torch.float32, {}),
        (4, (16, 48), torch.float32, {}),
        (4, (48, 16), torch.bfloat16, {}),
        (4, (48, 16), torch.float32, {"use_intel_amx_backend": True}),
    ],
)
def test_other_products_are_left_to_sglang(products, rows, shape, dtype, more):
    layer = SimpleNamespace(weight=torch.ones(shape, dtype=dtype), **more)
    assert products.linear(_left, None, layer, torch.ones(rows, shape[1], dtype=dtype)) == "left to SGLang"


def test_a_bias_is_left_to_sglang(products):
    layer = SimpleNamespace(weight=torch.ones(48, 16))
    assert products.linear(_left, None, layer, torch.ones(4, 16), torch.ones(48)) == "left to SGLang"


def _processor(on_policy=None):
    return SimpleNamespace(rl_on_policy_target=on_policy)


def test_an_output_layer_takes_more_rows(products):
    weight = torch.randn(1024, 16, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    found = products.output_layer(_left, _processor(), hidden, SimpleNamespace(weight=weight), None, out=None)
    torch.testing.assert_close(found, hidden @ weight.T, atol=1e-5, rtol=1e-5)


class Quantized:
    """As SGLang's methods of quantized layers, of which only the name is looked at."""


@pytest.mark.parametrize(
    ("head", "processor", "bias"),
    [
        (SimpleNamespace(weight=torch.ones(1024, 16), set_lora=None), _processor(), None),
        (SimpleNamespace(qweight=torch.ones(1024, 16)), _processor(), None),
        (SimpleNamespace(weight=torch.ones(1024, 16), quant_method=Quantized()), _processor(), None),
        (SimpleNamespace(weight=torch.ones(1024, 16), use_intel_amx_backend=True), _processor(), None),
        (SimpleNamespace(weight=torch.ones(1024, 16)), _processor("fsdp"), None),
        (SimpleNamespace(weight=torch.ones(1024, 16)), _processor(), torch.ones(1024)),
    ],
)
def test_an_output_layer_that_is_not_plain_is_left_to_sglang(products, head, processor, bias):
    def original(given, hidden, lm_head, embedding_bias, *, out):
        assert (given, lm_head, embedding_bias, out) == (processor, head, bias, None)
        return "left to SGLang"

    assert products.output_layer(original, processor, torch.ones(4, 16), head, bias, out=None) == "left to SGLang"
