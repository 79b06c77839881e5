"""Host memory for tensors that are offloaded and restored, allocated once and reused."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

BLOCK_BYTES = 2**30
"""Torch rounds a pinned allocation up to a power of two: large blocks have that size already."""


_ALIGNED = 64
"""Bytes to a multiple of which a tensor begins in a block."""


class HostMemory:
    """Holds the bytes of some pieces of memory of `device`; pinned for a GPU, so that copies run at the link's rate.

    Grows to the most that was ever put in, and is never given back.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pinned = device.type == "cuda"
        self._blocks: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes that were allocated."""
        return sum(len(block) for block in self._blocks)

    def copy_from(self, storages: Sequence[torch.UntypedStorage]) -> None:
        """Copy the bytes of all `storages` here; the previous content is lost."""
        self._reserve(sum(storage.nbytes() for storage in storages))
        for device, host in self._pieces(storages):
            host.copy_(device, non_blocking=self._pinned)
        self._synchronize()

    def copy_to(self, storages: Sequence[torch.UntypedStorage]) -> None:
        """Copy the bytes back to `storages`, which have the sizes of those in copy_from, in the same order."""
        for device, host in self._pieces(storages):
            device.copy_(host, non_blocking=self._pinned)
        self._synchronize()

    def _reserve(self, nbytes: int) -> None:
        while (missing := nbytes - self.nbytes) > 0:
            size = min(missing, BLOCK_BYTES)
            self._blocks.append(_block(size, self._pinned))

    def _pieces(self, storages: Sequence[torch.UntypedStorage]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield parts of a storage [bytes] with their places in a block, in order."""
        number, used = 0, 0
        for storage in storages:
            whole = torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)
            start = 0
            while start < len(whole):
                block = self._blocks[number]
                size = min(len(whole) - start, len(block) - used)
                yield whole[start : start + size], block[used : used + size]
                start, used = start + size, used + size
                if used == len(block):
                    number, used = number + 1, 0

    def _synchronize(self) -> None:
        if self._pinned:
            torch.cuda.synchronize()


def storages_of(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    """Return the storages of `tensors`, of any shape and dtype, each once; for FP8 tensors that of their values,
    without the scales.
    """
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        quantized = getattr(tensor, "get_data_tensors", None)
        for part in (tensor,) if quantized is None else quantized():
            if part is not None:
                storage = part.untyped_storage()
                found[storage._cdata] = storage
    return list(found.values())


@torch.no_grad()
def host_copies(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Return copies of `tensors`, with their shapes and dtypes, as plain tensors in host memory, contiguous in few
    blocks.
    """
    pinned = device.type == "cuda"
    sizes = {
        name: -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED for name, tensor in tensors.items()
    }
    left, block, used = sum(sizes.values()), torch.empty(0), 0
    copies = {}
    for name, tensor in tensors.items():
        if len(block) - used < sizes[name]:
            block, used = _block(max(sizes[name], min(left, BLOCK_BYTES)), pinned), 0
        place = block[used : used + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        copies[name] = place.copy_(tensor, non_blocking=pinned)
        used, left = used + sizes[name], left - sizes[name]
    if pinned:
        torch.cuda.synchronize()
    return copies


def _block(nbytes: int, pinned: bool) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
