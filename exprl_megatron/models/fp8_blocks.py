"""Block-quantized FP8 weights as DeepSeek-V3 published them and SGLang and vLLM read them.

A matrix NAME becomes float8_e4m3fn, with NAME_scale_inv, fp32, [rows / 128, columns / 128] rounded up: what each block
of 128 x 128 numbers is multiplied by to give the weights back. It is the block's largest magnitude / 448 (the largest
e4m3 number). Norms, biases, the embedding, the output layer and routers stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.name_map import HEAD, Parameter, is_vocabulary

if TYPE_CHECKING:
    import torch

BLOCK = 128
SCALE = "_scale_inv"
LARGEST = 448.0
"""torch.finfo(torch.float8_e4m3fn).max"""


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize [rows, columns] of any float format to float8_e4m3fn; returns it and its scales, fp32."""
    import torch

    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    largest = blocks.abs().amax(dim=(1, 3))
    # A block of zeros, or of magnitudes whose scale would be 0, keeps the scale 1.
    scale = largest / LARGEST
    scale = torch.where(scale > 0, scale, 1.0)
    values = (blocks / scale[:, None, :, None]).clamp(-LARGEST, LARGEST)
    return values.view_as(padded)[:rows, :columns].to(torch.float8_e4m3fn), scale


def dequantize(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the matrix [rows, columns] of FP8 `values` and `scale` [row blocks, column blocks] in fp32: the inverse of
    quantize up to its rounding.
    """
    rows, columns = values.shape
    spread = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return values.float() * spread


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether the Hugging Face tensor `name` is quantized: a matrix of attention or of an MLP or expert."""
    router = name.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight"))
    return len(shape) == 2 and not is_vocabulary(name) and not router


def quantization_config(names: list[str], left_out: list[str] | None = None) -> dict:
    """Return `quantization_config` of config.json; `names` are all of the model's tensors but those that are
    `left_out`.
    """
    kept = [name.removesuffix(".weight") for name in names if name == HEAD or name.endswith("gate.weight")]
    kept += [name.removesuffix(".weight") for name in left_out or () if name.endswith(".weight")]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": kept or [HEAD.removesuffix(".weight")],
    }


def check_quantizable(table: list[Parameter], shapes: dict[str, tuple[int, ...]], architecture: Architecture) -> None:
    """Check that servers can read the FP8 blocks of a model.

    Servers concatenate query, key and value, and gate and up: blocks must not cross the boundaries.

    Raises:
        UserError: a matrix has rows that are not a multiple of a block's, or the model has gated delta nets.
    """
    if architecture.delta_net is not None:
        raise UserError(
            f"This {architecture.family} model has gated delta nets, whose FP8 blocks are not supported; write bf16."
        )
    for parameter in table:
        for name in parameter.hf_names:
            if len(parameter.hf_names) > 1 and is_quantized(name, shapes[name]) and shapes[name][0] % BLOCK:
                raise UserError(
                    f"{name} of this {architecture.family} model has {shapes[name][0]} rows, not a multiple of "
                    f"{BLOCK}, so its FP8 blocks could not be served; write bf16."
                )
