"""Rotary frequencies of an architecture, as transformers 5 and SGLang compute them."""

import math

import torch

from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.rope import LinearScaling, Llama3Scaling, YarnScaling


def rope_frequencies(architecture: Architecture) -> torch.Tensor:
    """Return the angle per position of a head's rotary pairs, [pairs], fp32, stretched as the architecture says."""
    turning = int(architecture.head_dim * architecture.rotary_share)
    exponents = torch.arange(0, turning, 2, dtype=torch.float32) / turning
    frequencies = 1.0 / architecture.rope_base**exponents
    match architecture.rope_scaling:
        case None:
            return frequencies
        case LinearScaling(factor):
            return frequencies / factor
        case Llama3Scaling() as scaling:
            kept = _kept_by_llama3(frequencies, scaling)
        case YarnScaling() as scaling:
            kept = _kept_by_yarn(architecture, scaling)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _kept_by_llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Return the share of each frequency that is not stretched, [head_dim / 2].

    1 for wavelengths below original_max_positions / high_freq_factor, 0 above original_max_positions /
    low_freq_factor, and linear in 1 / wavelength between the two (transformers, rope type `llama3`).
    """
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    return ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0.0, 1.0)


def _kept_by_yarn(architecture: Architecture, scaling: YarnScaling) -> torch.Tensor:
    """Return the share of each frequency that is not stretched, [head_dim / 2] (arXiv 2309.00071, section 3.2).

    1 for pairs of dimensions that turn `beta_fast` times within the original length, 0 for those that turn
    `beta_slow` times, and linear in the number of the pair between the two (transformers, rope type `yarn`).
    """
    dim, pairs = architecture.head_dim, architecture.head_dim // 2

    def pair(turns: float) -> float:
        """Return the pair that turns so often within the original length."""
        wavelength = scaling.original_max_positions / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(architecture.rope_base))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    # Where both are one pair, transformers and SGLang move the last by 0.001.
    width = last - first or 0.001
    return 1 - ((torch.arange(pairs, dtype=torch.float32) - first) / width).clamp(0.0, 1.0)
