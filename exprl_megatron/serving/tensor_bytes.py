"""The bytes of a tensor, for libraries that read memory."""

import ctypes

import torch


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, of any shape and dtype, without a copy; valid while the tensor
    exists.

    `Tensor.numpy()` returns the same, but its storage could never be resized again: the weights of a colocated trainer
    could then no longer be offloaded.
    """
    nbytes = tensor.numel() * tensor.element_size()
    if not nbytes:
        return memoryview(b"")
    memory = (ctypes.c_uint8 * nbytes).from_address(tensor.data_ptr())
    memory.tensor = tensor  # lives as long as the view
    return memoryview(memory).cast("B")
