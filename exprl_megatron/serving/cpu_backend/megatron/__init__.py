"""Keeps Megatron, which SGLang imports where it finds it (a debugging aid), out of the servers' start."""

raise ImportError("Megatron is not for SGLang servers")
