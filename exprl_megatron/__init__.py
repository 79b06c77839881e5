"""ExpRL mid-training and the sparse-reward RL after it, on Megatron-Core and SGLang."""

__version__ = "0.1.0"
