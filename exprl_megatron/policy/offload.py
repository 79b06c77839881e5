"""The policy's memory on its device, and how it makes room for servers on the same device.

Weights and the optimizer's state go to host memory and come back to the same tensors, so that views of them (the
optimizer's of fp32 parameters) stay views; gradients are zero between updates, so that their memory is released, and
so are Transformer Engine's quantized copies of weights, which its modules make again when they are next used.
"""

from collections.abc import Iterable
from typing import Literal

import torch

from exprl_megatron.policy.host_memory import HostMemory, storages_of
from exprl_megatron.policy.policy import Policy

OffloadPart = Literal["weights", "gradients", "optimizer"]
TRAINING: tuple[OffloadPart, ...] = ("gradients", "optimizer")
"""What only learning needs."""


class Offload:
    """Moves the parts of one policy; collective only in that every rank should do the same.

    Nothing may compute with a part, or begin a stage, while it is away.
    """

    def __init__(self, policy: Policy):
        self._policy = policy
        self._cuda = policy.world.device.type == "cuda"
        self._host: dict[OffloadPart, HostMemory] = {
            "weights": policy.host_weights,
            "optimizer": HostMemory(policy.world.device),
        }
        self._offloaded: dict[OffloadPart, list[tuple[torch.UntypedStorage, int]]] = {}
        """Of each part that is away its memory, emptied, and the sizes that it had; gradients come back as zeros."""

    def offload(self, *parts: OffloadPart) -> None:
        """Free the device's memory of these parts; what is away already stays so."""
        for part in parts:
            if part in self._offloaded:
                continue
            if part == "weights":
                self._policy.gather_weights()
                _drop_quantized_copies(self._policy.chunks)
            storages = self._storages(part)
            self._offloaded[part] = [(storage, storage.nbytes()) for storage in storages]
            if part in self._host:
                self._host[part].copy_from(storages)
            for storage in storages:
                storage.resize_(0)
        if self._cuda:
            # Frees buckets that servers have released since then; until now torch counted them as used.
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()

    def onload(self, *parts: OffloadPart) -> None:
        """Restore these parts to the device as they were."""
        for part in parts:
            away = self._offloaded.pop(part, [])
            for storage, nbytes in away:
                storage.resize_(nbytes)
            if part in self._host:
                self._host[part].copy_to([storage for storage, _ in away])
            else:
                for storage, _ in away:
                    storage.fill_(0)

    def bytes_on_device(self) -> dict[OffloadPart, int]:
        """Return the bytes on the device, of each part."""
        parts: tuple[OffloadPart, ...] = ("weights", *TRAINING)
        return {part: sum(storage.nbytes() for storage in self._storages(part)) for part in parts}

    def _storages(self, part: OffloadPart) -> list[torch.UntypedStorage]:
        """Return the part's pieces of memory on the device."""
        weights = self._policy.weight_storages()
        if part == "weights":
            return weights
        if part == "gradients":
            return storages_of(buffer.grad_data for buffer in self._buffers())
        stage, device = self._policy.stage, self._policy.world.device.type
        state = [] if stage is None else _optimizer_tensors(stage.optimizer)
        # Without half precision the optimizer steps the weights themselves; some of its counters are on the host.
        known = {storage._cdata for storage in weights}
        found = storages_of(tensor for tensor in state if tensor.device.type == device)
        return [storage for storage in found if storage._cdata not in known]

    def _buffers(self) -> list:
        """Return Megatron's buffers, which hold the gradients."""
        return [buffer for chunk in self._policy.wrapped for buffer in chunk.buffers + chunk.expert_parallel_buffers]


def _drop_quantized_copies(chunks: Iterable[torch.nn.Module]) -> None:
    """Drop the weights that Transformer Engine's modules keep quantized after a first micro-batch, in addition to BF16
    ones.
    """
    for chunk in chunks:
        for module in chunk.modules():
            copies = getattr(module, "_fp8_workspaces", None)
            if copies:
                copies.clear()


def _optimizer_tensors(optimizer) -> Iterable[torch.Tensor]:
    """Yield the optimizer's main parameters and its moments."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = one.optimizer
        yield from (parameter for group in inner.param_groups for parameter in group["params"])
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))
