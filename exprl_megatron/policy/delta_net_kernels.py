"""Whether the kernels of gated delta nets are there, without which Megatron builds no such layer on CUDA.

megatron-core's GatedDeltaNet takes `causal_conv1d`, `l2norm` and `chunk_gated_delta_rule` of flash-linear-attention
(megatron/core/ssm/gated_delta_net/common.py); the package fla-core has all three.
"""

import importlib.util

from exprl_megatron.models.architecture import Architecture

PACKAGE, MODULE = "fla-core", "fla"


def has_delta_net_kernels() -> bool:
    """Return whether flash-linear-attention is installed; looked up, not imported."""
    return importlib.util.find_spec(MODULE) is not None


def kernel_violations(architecture: Architecture, cuda: bool) -> list[str]:
    """Return one sentence where a policy of this architecture would be built on `cuda` without its kernels."""
    if architecture.delta_net is None or not cuda or has_delta_net_kernels():
        return []
    return [
        f"policy.model is a {architecture.family} model with gated delta nets, whose kernels on CUDA are those of "
        f"flash-linear-attention, which is not installed; install {PACKAGE} as requirements/gpu.txt pins it."
    ]
