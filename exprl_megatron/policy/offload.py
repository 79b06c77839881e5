"""The policy's memory on its device, and how it makes room for servers on the same device.

Weights go to host memory and come back; gradients are nothing between updates, so that their memory is given up; the
optimizer's state is moved by Megatron, on a GPU alone, since elsewhere it is in host memory already.
"""

from collections.abc import Iterable
from typing import Literal

import torch

from exprl_megatron.policy.policy import Policy

Part = Literal["weights", "gradients", "optimizer"]
TRAINING: tuple[Part, ...] = ("gradients", "optimizer")
"""What only learning needs."""


class Offload:
    """Moves the parts of one policy; collective only in that every rank should do the same.

    Nothing may compute with a part, or begin a stage, while it is away.
    """

    def __init__(self, policy: Policy):
        self._policy = policy
        self._cuda = policy.world.device.type == "cuda"
        self._away: dict[Part, bool] = {"weights": False, "gradients": False, "optimizer": False}
        self._weights: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
        """Of every piece of memory that holds weights: itself, emptied, and its copy on the host."""

    def away(self, *parts: Part) -> None:
        """Free the device's memory of these parts; what is away already stays so."""
        for part in parts:
            if not self._away[part]:
                self._away[part] = True
                {"weights": self._weights_away, "gradients": self._gradients, "optimizer": self._optimizer}[part]()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def back(self, *parts: Part) -> None:
        """Have these parts on the device again, as they were."""
        for part in parts:
            if self._away[part]:
                self._away[part] = False
                {"weights": self._weights_back, "gradients": self._gradients, "optimizer": self._optimizer}[part]()
        if self._cuda:
            torch.cuda.synchronize()

    def held(self) -> dict[Part, int]:
        """Bytes on the device, of each part."""
        optimizer = {} if self._policy.stage is None else _storages(_optimizer_tensors(self._policy.stage.optimizer))
        weights = _storages(self._parameters())
        device = self._policy.world.device.type
        # Without half precision the optimizer steps the weights themselves.
        own = [storage for key, storage in optimizer.items() if key not in weights and storage.device.type == device]
        return {
            "weights": sum(storage.nbytes() for storage in weights.values()),
            "gradients": sum(buffer.grad_data.untyped_storage().nbytes() for buffer in self._buffers()),
            "optimizer": sum(storage.nbytes() for storage in own),
        }

    def _parameters(self) -> Iterable[torch.Tensor]:
        return (parameter.data for chunk in self._policy.chunks for parameter in chunk.parameters())

    def _buffers(self) -> list:
        """Megatron's, which hold the gradients."""
        return [buffer for chunk in self._policy.wrapped for buffer in chunk.buffers + chunk.expert_parallel_buffers]

    def _weights_away(self) -> None:
        self._policy.gather_weights()
        for storage in _storages(self._parameters()).values():
            host = torch.UntypedStorage(storage.nbytes(), device="cpu")
            if self._cuda:
                host = host.pin_memory()
            host.copy_(storage)
            self._weights.append((storage, host))
            storage.resize_(0)

    def _weights_back(self) -> None:
        for storage, host in self._weights:
            storage.resize_(host.nbytes())
            storage.copy_(host)
        self._weights = []

    def _gradients(self) -> None:
        """To where `_away` says."""
        for buffer in self._buffers():
            if self._away["gradients"]:
                buffer.offload_to_cpu(move_params=False, move_grads=True)
            else:
                buffer.reload_from_cpu(move_params=False, move_grads=True)

    def _optimizer(self) -> None:
        """To where `_away` says."""
        if not self._cuda or self._policy.stage is None:
            return
        optimizer = self._policy.stage.optimizer
        if self._away["optimizer"]:
            optimizer.offload_to_cpu()
        else:
            optimizer.restore_from_cpu()


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """Each piece of memory once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in storages}


def _optimizer_tensors(optimizer) -> Iterable[torch.Tensor]:
    """What Megatron's optimizer steps, and the moments."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = one.optimizer
        yield from (parameter.data for group in inner.param_groups for parameter in group["params"])
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))
