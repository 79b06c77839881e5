"""Matrix products of the few rows that a small batch decodes, in fp32, with the weight as the left factor.

MKL computes y = x W^T for 2 to 4 rows of x 1.3 to 4 times as fast as (W x^T)^T, where W has at least as many rows as
columns; for the output layer's many rows up to 8 (`tools/bench_cpu_decode.py`). All else is left to SGLang.
"""

from collections.abc import Callable

import torch

MOST_ROWS = 4
MOST_ROWS_OF_LONG = 8
PLAIN = ("NoneType", "UnquantizedEmbeddingMethod", "UnquantizedLinearMethod")
"""Classes of an output layer's `quant_method` for which SGLang multiplies by the weight itself."""
LONG = 32
"""A weight is long where its rows are this many times its columns."""


def linear(original: Callable, method, layer, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Replace UnquantizedLinearMethod.apply: x [rows, inputs] -> [rows, outputs]."""
    packed = getattr(layer, "use_intel_amx_backend", False)
    if bias is not None or packed or not weight_goes_first(x, layer.weight):
        return original(method, layer, x, bias)
    return weight_first(x, layer.weight)


def output_layer(
    original: Callable, processor, hidden_states: torch.Tensor, lm_head, embedding_bias=None, **settings
) -> torch.Tensor:
    """Replace LogitsProcessor._compute_lm_head: hidden_states [rows, hidden] -> logits [rows, vocabulary]."""
    plain = (
        embedding_bias is None
        and hasattr(lm_head, "weight")
        and not hasattr(lm_head, "set_lora")
        and not getattr(lm_head, "use_intel_amx_backend", False)
        and type(getattr(lm_head, "quant_method", None)).__name__ in PLAIN
        and processor.rl_on_policy_target is None
    )
    if not plain or not weight_goes_first(hidden_states, lm_head.weight):
        return original(processor, hidden_states, lm_head, embedding_bias, **settings)
    return weight_first(hidden_states, lm_head.weight)


def weight_goes_first(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether weight_first is the faster way to multiply x [rows, inputs] by weight [outputs, inputs]."""
    if x.dim() != 2 or weight.dim() != 2 or not x.dtype == weight.dtype == torch.float32:
        return False
    outputs, inputs = weight.shape
    most = MOST_ROWS_OF_LONG if outputs >= LONG * inputs else MOST_ROWS
    return outputs >= inputs and 2 <= len(x) <= most


def weight_first(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute x weight^T, row by row in memory as SGLang's own."""
    return torch.mm(weight, x.t()).t().contiguous()
