"""How a trainer runs a layout beyond the layout itself; published figures differ in it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Practice:
    """Switches of a training program. The defaults are this trainer's."""

    tp_overlap: bool = False
    """Tensor-parallel transfers run beside the products (Transformer Engine's user buffers)."""
    dp_overlap: bool = True
    """Gradients are reduced and parameters gathered beside the backward and forward pass."""
    ep_overlap: bool = False
    """The exchange of tokens between experts runs beside another micro-batch's computation."""
    once_per_node: bool = False
    """A token crosses to a node once, however many of its experts live there (DeepEP, HybridEP)."""
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


OURS = Practice()
