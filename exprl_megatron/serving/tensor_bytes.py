"""The bytes of a tensor, for libraries that read memory."""

import ctypes

import torch


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy; valid while the tensor is.

    `Tensor.numpy()` would do the same, but its storage could never be resized again: a colocated trainer's weights
    could then no longer leave memory.
    """
    nbytes = tensor.numel() * tensor.element_size()
    if not nbytes:
        return memoryview(b"")
    memory = (ctypes.c_uint8 * nbytes).from_address(tensor.data_ptr())
    memory.tensor = tensor  # lives as long as the view
    return memoryview(memory).cast("B")
