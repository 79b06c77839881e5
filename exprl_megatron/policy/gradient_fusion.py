"""Whether weight gradients are added to Megatron's fp32 buffers by the matrix product itself, for which apex is needed.

Transformer Engine's layers could do so alone, but Megatron refuses to build its own output layer without apex's kernel.
"""

from exprl_megatron.config.policy import PolicyConfig


def has_fused_kernel() -> bool:
    """Return whether apex's kernel can be loaded, as Megatron looks for it."""
    # Apex's extensions need torch's libraries.
    import torch  # noqa: F401

    try:
        import fused_weight_gradient_mlp_cuda  # noqa: F401
    except ImportError:
        return False
    return True


def fuses_gradients(config: PolicyConfig, cuda: bool) -> bool:
    """Return Megatron's `gradient_accumulation_fusion` for this policy; None of the config is True wherever
    that works.
    """
    wanted = config.gradient_accumulation_fusion
    if wanted is None:
        return cuda and config.precision.resolved(cuda).kind == "bf16" and has_fused_kernel()
    return wanted


def fusion_violations(config: PolicyConfig, cuda: bool) -> list[str]:
    """Return one sentence where the config demands what `cuda`, the precision or this environment does not allow."""
    if not config.gradient_accumulation_fusion:
        return []
    kind = config.precision.resolved(cuda).kind
    reasons = {
        "this machine does not run on CUDA": not cuda,
        f"policy.precision is {kind}, and only bf16 gradients are fused": kind != "bf16",
        "apex is not installed (build the image with --build-arg APEX=25.09)": cuda and not has_fused_kernel(),
    }
    return [
        f"policy.gradient_accumulation_fusion is true, but {reason}; leave it out, or set it to false."
        for reason, holds in reasons.items()
        if holds
    ]
