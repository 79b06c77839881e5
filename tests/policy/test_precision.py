from dataclasses import replace
from types import MethodType

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.policy.precision import ddp_settings, dequantized, fp8_settings, optimizer_settings, set_parameter


def megatron(**precision) -> TransformerConfig:
    """Megatron's configuration, which checks what it is given."""
    return TransformerConfig(
        num_layers=4, hidden_size=64, num_attention_heads=4, bf16=True, **fp8_settings(PrecisionConfig(**precision))
    )


@pytest.mark.parametrize(
    ("kind", "number_format", "recipe"),
    [
        ("fp8-delayed", "hybrid", "delayed"),
        ("fp8-tensorwise", "hybrid", "tensorwise"),
        ("fp8-blockwise", "e4m3", "blockwise"),
        ("mxfp8", "e4m3", "mxfp8"),
    ],
)
def test_each_kind_is_a_recipe_that_megatron_takes(kind, number_format, recipe):
    config = megatron(kind=kind)
    assert (config.fp8, config.fp8_recipe) == (number_format, recipe)
    assert not (config.fp8_param or config.fp8_dot_product_attention or config.fp8_multi_head_attention)
    assert not config.first_last_layers_bf16
    assert optimizer_settings(config) == {"fp8_recipe": recipe} and ddp_settings(config) == {}
    assert OptimizerConfig(**optimizer_settings(config)).fp8_recipe == recipe


def test_layers_in_bf16_attention_and_parameters_reach_megatron():
    config = megatron(kind="fp8-tensorwise", first_last_bf16=2, fp8_attention=True, fp8_parameters=True)
    assert config.first_last_layers_bf16
    assert config.num_layers_at_start_in_bf16 == config.num_layers_at_end_in_bf16 == 2
    assert config.fp8_param and config.fp8_dot_product_attention
    assert DistributedDataParallelConfig(**ddp_settings(config)).fp8_param_gather


@pytest.mark.parametrize("precision", [{"kind": "bf16"}, {"kind": "fp32"}, {"kind": "mxfp8", "emulate": True}])
def test_megatron_hears_nothing_of_fp8_where_there_is_none_or_it_is_emulated(precision):
    config = megatron(**precision)
    assert config.fp8 is None and not config.fp8_param
    assert optimizer_settings(config) == ddp_settings(config) == {}


def test_megatron_itself_refuses_what_the_matrix_refuses():
    with pytest.raises(ValueError, match="Delayed scaling does not support first / last layer in BF16"):
        megatron(kind="fp8-delayed", first_last_bf16=1)
    with pytest.raises(ValueError, match="number of layers per pipeline stage"):
        replace(megatron(kind="mxfp8"), first_last_layers_bf16=True, num_layers_at_start_in_bf16=5)


def test_the_optimizers_weights_start_from_the_loaded_values_and_not_from_those_before():
    parameter, value = torch.nn.Parameter(torch.zeros(4)), torch.tensor([0.1, 0.2, 0.3, 0.4])
    exact = torch.full((4,), 9.0)
    parameter.get_high_precision_init_val = MethodType(lambda self: exact, parameter)
    set_parameter(parameter, value)
    assert torch.equal(parameter.data, value) and torch.equal(exact, value)

    parameter.get_high_precision_init_val = MethodType(lambda self: None, parameter)
    set_parameter(parameter, 2 * value)
    assert torch.equal(dequantized(parameter), 2 * value)
