"""Megatron's settings for a precision, and access to parameters in 8 bits from other code."""

from typing import Any

import torch
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.transformer.transformer_config import TransformerConfig

from exprl_megatron.config.precision import PrecisionConfig

_RECIPES: dict[str, tuple[str, str]] = {
    "fp8-delayed": ("hybrid", "delayed"),
    "fp8-tensorwise": ("hybrid", "tensorwise"),
    "fp8-blockwise": ("e4m3", "blockwise"),
    "mxfp8": ("e4m3", "mxfp8"),
}
"""Megatron's `fp8` and `fp8_recipe`. One scale for a whole tensor needs E5M2's range for gradients, blocks do not."""


def fp8_settings(precision: PrecisionConfig) -> dict[str, Any]:
    """Return the TransformerConfig fields that say what is multiplied in 8 bits; none for bf16, fp32 and emulation."""
    if not precision.fp8 or precision.emulate:
        return {}
    number_format, recipe = _RECIPES[precision.kind]
    return {
        "fp8": number_format,
        "fp8_recipe": recipe,
        "fp8_param": precision.fp8_parameters,
        "fp8_dot_product_attention": precision.fp8_attention,
        "first_last_layers_bf16": precision.first_last_bf16 > 0,
        "num_layers_at_start_in_bf16": precision.first_last_bf16,
        "num_layers_at_end_in_bf16": precision.first_last_bf16,
    }


def ddp_settings(config: TransformerConfig) -> dict[str, Any]:
    """Return the DistributedDataParallelConfig fields that go with a model's FP8 parameters."""
    return {"fp8_param_gather": True} if config.fp8_param else {}


def optimizer_settings(config: TransformerConfig) -> dict[str, Any]:
    """Return Megatron's OptimizerConfig fields that go with a model's FP8 products."""
    return {"fp8_recipe": config.fp8_recipe} if config.fp8 else {}


def dequantized(parameter: torch.Tensor) -> torch.Tensor:
    """Return the parameter's values as an ordinary tensor of its nominal dtype; no copy where it is one already."""
    return dequantize_fp8_tensor(parameter) if is_float8tensor(parameter) else parameter


@torch.no_grad()
def set_parameter(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Set a parameter, or buffer, to `value` (of its shape), rounding where the parameter is in 8 bits.

    Such a parameter remembers, until an optimizer asks, what it was before it was rounded: the optimizer's fp32
    weights start from that, so it has to be set too.
    """
    parameter.copy_(value)
    exact = parameter.get_high_precision_init_val() if hasattr(parameter, "get_high_precision_init_val") else None
    if exact is not None:
        exact.copy_(value)
