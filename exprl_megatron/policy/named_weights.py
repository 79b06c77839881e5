"""The tensors of a model chunk that make up the model."""

from collections.abc import Iterator

import torch

from exprl_megatron.models.name_map import is_buffer


def named_weights(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor, in this rank's shape and dtype, of the chunk's parameters, and then of the buffers that
    the name map has.
    """
    yield from chunk.named_parameters()
    yield from ((name, buffer) for name, buffer in chunk.named_buffers() if is_buffer(name))
