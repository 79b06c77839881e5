"""Switches between training and sampling where trainer and servers share devices, and memory statistics of each phase.

For training, the servers release their KV cache and their weights (SGLang's release_memory_occupation). For sampling,
the trainer offloads gradients and optimizer to the host, the servers resume their weights and receive the new ones, the
trainer offloads its weights, and the servers resume their KV cache. With separate devices only weights are pushed.
"""

from typing import Literal

import torch

from exprl_megatron.config.placement import PlacementConfig
from exprl_megatron.errors import RunStopped
from exprl_megatron.policy.offload import TRAINING, Offload
from exprl_megatron.policy.policy import Policy
from exprl_megatron.serving.server_pool import ServerPool
from exprl_megatron.utils.required import required
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.sync import WeightSync

_GIB = 2**30


class PhaseSwitch:
    """The phase of this rank. Every rank calls the same methods; only rank 0 needs `pool`."""

    def __init__(
        self,
        config: PlacementConfig,
        policy: Policy,
        coordinator: RankCoordinator,
        pool: ServerPool | None,
        sync: WeightSync,
    ):
        self._config = config
        self._coordinator = coordinator
        self._pool = pool
        self._sync = sync
        self._offload = Offload(policy)
        self._device = policy.world.device
        self._phase: Literal["learning", "sampling"] | None = None if config.kind == "colocated" else "learning"
        """None at the start, when it is not known whether the servers have released their memory."""
        self._memory_stats: dict[str, float] = {}

    def sync_weights(self, version: str) -> dict[str, float]:
        """Push the policy's current weights to the servers as `version` and switch to sampling; returns metrics.

        Raises:
            RunStopped: the trainer keeps more memory on its device than the config allows.
            ServerError: see WeightSync.push_weights.
        """
        if self._config.kind == "separate":
            return self._sync.push_weights(version)
        self._offload.offload(*TRAINING)
        # Servers may have registered while they were asleep.
        self._offload.onload("weights")
        self._wake("weights")
        metrics = self._sync.push_weights(version)
        self._offload.offload("weights")
        self._note(
            "sampling", sum(self._offload.bytes_on_device().values()) if self._device.type == "cpu" else _own_memory()
        )
        self._wake("kv_cache")
        self._phase = "sampling"
        return metrics

    def switch_to_training(self) -> None:
        """Switch to training, unless this is the phase; called before the trainer allocates memory.

        Raises:
            RunStopped: the servers keep more memory on a device than the config allows.
        """
        if self._phase == "learning":
            return
        slept = put_to_sleep(self._coordinator, self._pool)
        self._note("learning", _foreign_memory(self._device))
        self._memory_stats["memory/servers_slept"] = float(slept)
        self._offload.onload("weights", *TRAINING)
        self._phase = "learning"

    def take_memory_stats(self) -> dict[str, float]:
        """Return the memory statistics of the phases since the last call, in GiB."""
        stats, self._memory_stats = self._memory_stats, {}
        return stats

    def _wake(self, tag: str) -> None:
        self._coordinator.broadcast_run(lambda: required(self._pool, "the pool of servers").wake(tag))

    def _note(self, phase: str, asleep: int) -> None:
        """Record the device's memory at the start of `phase`; `asleep` is the memory of the sleeping side in bytes."""
        resident = self._offload.bytes_on_device()
        self._memory_stats |= {f"memory/{phase}/{part}": size / _GIB for part, size in resident.items()}
        self._memory_stats[f"memory/{phase}/asleep"] = asleep / _GIB
        bound = self._config.max_asleep_gb
        if bound is not None and asleep > bound * _GIB:
            side = "the trainer" if phase == "sampling" else "the servers"
            raise RunStopped(
                f"{side} left {asleep / _GIB:.2f} GiB on the device of trainer-{torch.distributed.get_rank()} in the "
                f"phase of {phase}, more than placement.max_asleep_gb ({bound:g}); raise it, or find what uses memory."
            )


def put_to_sleep(coordinator: RankCoordinator, pool: ServerPool | None) -> bool:
    """Let all sampling servers release their memory; returns whether they can (on a CPU they cannot).

    Every rank calls it; only rank 0 needs `pool`, which is None where a run has no such servers.
    """
    return coordinator.broadcast_from_rank0(lambda: pool is not None and coordinator.run(pool.sleep()))


def _own_memory() -> int:
    """Return the bytes that this process uses on its GPU, including the allocator's reserve."""
    return torch.cuda.memory_reserved()


def _foreign_memory(device: torch.device) -> int:
    """Return the bytes that other processes use on this rank's GPU, including CUDA contexts; 0 on a CPU."""
    if device.type == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()
