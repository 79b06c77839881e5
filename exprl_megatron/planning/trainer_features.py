"""Features of a training program beyond its layout, in which published figures differ."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainerFeatures:
    """Features of a training program. The defaults are this trainer's; others serve the planner's validation."""

    tp_overlap: bool = False
    """Tensor-parallel transfers overlap with the products (Transformer Engine's user buffers)."""
    dp_overlap: bool = True
    """Reduction of gradients and gathering of parameters overlap with the backward and forward pass."""
    ep_overlap: bool = False
    """The exchange of tokens between experts overlaps with another micro-batch's computation."""
    once_per_node: bool = False
    """A token is sent to a node once for all of its experts there (DeepEP, HybridEP)."""
    fsdp: bool = False
    """Parameters are sharded over data-parallel ranks and gathered for each micro-batch, forward and backward."""
    gradient_bytes: float = 4.0
    """Bytes of a gradient while it is reduced."""
    fused_loss: bool = False
    """Softmax and loss in one kernel over BF16 logits, instead of a chain of them in fp32."""
    flash_attention: int = 3
    """Generation of the attention kernels: 3 stands for FlashAttention-3 and cuDNN 9, 2 for those before (2023)."""
    head_recomputed: bool = True
    """The backward pass computes logits again, so that they never exist whole."""
    recomputed_share: float = 1.0
    """With `recompute: full`, the share of layers that are computed again."""
    offload: float = 0.0
    """Share of the optimizer state that is kept and stepped in host memory."""
    lora: bool = False
    """Weights are frozen but for low-rank adapters: no weight gradients, nothing to reduce."""


THIS_TRAINER = TrainerFeatures()
