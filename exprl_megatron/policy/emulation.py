"""FP8 training on a machine without FP8 kernels: operands are rounded as the recipe would, products are fp32.

A linear layer multiplies three times: output = input weight^T, gradient of input = gradient weight, gradient of
weight = gradient^T input. Each operand of each product is rounded as the recipe says for that product. Where ranks
share a layer, what sequence parallelism gathers is rounded after the gathering, all else is rounded as the local
tensor that it is, as in Transformer Engine. docs/fp8_emulation.md says what is not emulated.
"""

from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch.autograd.function import once_differentiable

from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.errors import UserError
from exprl_megatron.policy.fp8_rounding import (
    Blockwise,
    Delayed,
    Rounding,
    Tensorwise,
    e8m0_scale,
    power_of_two_scale,
)


class RoundedLinear(torch.autograd.Function):
    """input [..., columns] x weight [rows, columns] -> [..., rows], every operand rounded by a Rounding."""

    @staticmethod
    def forward(ctx, values: torch.Tensor, weight: torch.Tensor, rounding: Rounding, training: bool) -> torch.Tensor:
        """Return `values` [..., in] times the transpose of `weight` [out, in], both rounded: [..., out].

        `training`: a backward pass follows.
        """
        flat, flat_again = rounding(values.reshape(-1, values.shape[-1]), "input", training)
        matrix, matrix_again = rounding(weight, "weight", training)
        ctx.rounding = rounding
        ctx.save_for_backward(flat_again, matrix_again)
        return (flat @ matrix.T).view(*values.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        """Return the gradients of input and weight, from that of the output, [..., out]."""
        values, weight = ctx.saved_tensors
        to_input, to_weight = ctx.rounding(gradient.reshape(-1, gradient.shape[-1]), "gradient", True)
        of_input = (to_input @ weight).view(*gradient.shape[:-1], weight.shape[1])
        return of_input, to_weight.T @ values, None, None


def emulate_fp8(chunk: GPTModel, precision: PrecisionConfig) -> None:
    """Make the linear layers of the chunk's transformer layers (experts' too) round their operands.

    Router, embedding, norms, attention's own products and output layer stay as they are, and so do `first_last_bf16`
    layers at either end of the model. No parameter or buffer is added, nothing is renamed.

    Raises:
        UserError: the device has Transformer Engine's layers.
    """
    if not chunk.config.use_cpu_initialization:
        raise UserError("policy.precision.emulate is for machines without CUDA; leave it out on this one.")
    kept = precision.first_last_bf16
    for layer in chunk.decoder.layers:
        if not kept < layer.layer_number <= chunk.config.num_layers - kept:
            continue
        for module in layer.modules():
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                # Megatron calls this function between a layer's communication and its product.
                module._forward_impl = partial(_forward, rounding=_rounding(precision.kind))


def _rounding(kind: str) -> Rounding:
    """Return the rounding of one linear layer's inputs, weights and gradients."""
    if kind == "fp8-delayed":
        return Delayed(parallel_state.get_amax_reduction_group(with_context_parallel=True))
    stateless: dict[str, Rounding] = {
        "fp8-tensorwise": Tensorwise(),
        "fp8-blockwise": Blockwise(128, square_weights=True, scale=power_of_two_scale),
        "mxfp8": Blockwise(32, square_weights=False, scale=e8m0_scale),
    }
    return stateless[kind]


def _forward(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    rounding: Rounding,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group,
    **_,
) -> torch.Tensor:
    """Compute Megatron's linear_with_grad_accumulation_and_async_allreduce, with communication as separate steps."""
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    output = RoundedLinear.apply(input, weight, rounding, torch.is_grad_enabled())
    return output if bias is None else output + bias
