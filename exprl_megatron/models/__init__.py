"""What a model is and what its tensors are called: no torch at import, no Megatron."""
